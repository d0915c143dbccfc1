"""The commands train a checkpoint in Hugging Face's format on conversations, resume it, and ask it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_models import LLAMA, random_params
from small_tokenizers import CHATML, byte_level

from adalomo_jax.cli import main
from adalomo_jax.models import decoder_of, generate
from adalomo_jax.pretrained.checkpoint import open_checkpoint
from adalomo_jax.pretrained.export import export_config, export_params
from adalomo_jax.pretrained.load import load_params
from adalomo_jax.pretrained.tokenizer_files import read_tokenizer

pytestmark = pytest.mark.slow  # whole runs
CONFIG = dataclasses.replace(LLAMA, vocab_size=byte_level().get_vocab_size())
CHAT = [{"role": "user", "content": "a cat?"}, {"role": "assistant", "content": "the cat sat on the mat"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    export_params(folder, random_params(CONFIG), CONFIG)
    export_config(folder, CONFIG, "float32")
    byte_level().save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


@pytest.fixture(scope="module")
def command(folder, tmp_path_factory):
    chats = tmp_path_factory.mktemp("data") / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(20)))
    sizes = ["--steps", "4", "--batch-size", "2", "--seq-len", "32", "--evaluate-every", "2", "--evaluate-first"]
    return ["finetune", "--model", str(folder), "--data", str(chats), *sizes]


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def finished(request, command, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / request.param
    options = ["--dtype", request.param, "--max-grad-norm", "1", "--microbatches", "2"]
    main([*command, *options, "--output", str(run)])
    return run, options


def test_it_trains_and_leaves_the_same_folder(folder, finished):
    run, options = finished
    found = open_checkpoint(run)
    assert found.config == CONFIG
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (run / name).read_bytes() == (folder / name).read_bytes()
    before, after = (load_file(path / "model.safetensors") for path in (folder, run))
    assert before.keys() == after.keys() and {str(x.dtype) for x in after.values()} == {options[1]}
    moved = [name for name in before if np.any(before[name].astype(after[name].dtype) != after[name])]
    assert "model.layers.0.mlp.up_proj.weight" in moved and "model.embed_tokens.weight" in moved
    losses = [json.loads(line).get("eval_loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_it_goes_on_to_the_same_bits(command, finished, tmp_path):
    """The resumed run also repeats a step's random draws: the rounding of bfloat16 weights."""
    run, options = finished
    again = tmp_path / "again"
    shutil.copytree(run, again)
    main([*command, *options, "--output", str(again), "--resume", "--resume-step", "2"])
    assert (again / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_it_answers(finished, capsys):
    run, _ = finished
    capsys.readouterr()
    main(["generate", "--model", str(run), "--prompt", "a cat?", "--chat", "--length", "8", "--temperature", "0"])
    found, tokenizer = open_checkpoint(run), read_tokenizer(run)
    model = decoder_of(found.config, load_params(found.config, found.source, "float32"))
    (asked,) = tokenizer.encode([tokenizer.prompt(CHAT[:1])], add_special=False)
    tokens = generate(model, jnp.asarray(asked.tokens)[None], 8, key=jax.random.key(0), temperature=0.0)
    answer = tokens[0, len(asked.tokens) :].tolist()
    answer = answer[: answer.index(tokenizer.eos)] if tokenizer.eos in answer else answer
    assert capsys.readouterr().out == tokenizer.decode(answer) + "\n"
