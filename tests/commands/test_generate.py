"""The command generate continues a prompt from a run or its checkpoint, and refuses wrong input."""

import dataclasses
import shutil
import subprocess
import sys
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adalomo_jax.commands.generate as generate_module
from adalomo_jax.cli import main
from adalomo_jax.commands.generate import Loaded, pieces
from adalomo_jax.models import PRESETS, Decoder, decoder_of, generate
from adalomo_jax.pretrained import ByteTokenizer
from adalomo_jax.pretrained.by_name import export_rest, find_model
from adalomo_jax.pretrained.export import export_params
from adalomo_jax.training.checkpoints.record import Origin
from adalomo_jax.training.checkpoints.save import open_saver

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=4, max_position_embeddings=40)
PROMPT = "a text"


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", dataclasses.replace(PRESETS["tiny"], **SIZES))
        yield find_model("tiny")


@pytest.fixture(scope="module")
def params(small):
    random = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Decoder(small.config, rngs=nnx.Rngs(0))), nnx.Param))
    return jax.tree.map(lambda w: jnp.asarray(random.normal(0.1, 0.4, w.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def folder(small, params, tmp_path_factory):
    """A folder as finetune leaves it."""
    folder = tmp_path_factory.mktemp("run")
    export_params(folder, params, small.config)
    export_rest(folder, small, "float32")
    return folder


generated = jax.jit(generate, static_argnames=("length", "temperature", "top_p"))


def expected(small, params, length, **options):
    model = decoder_of(small.config, params)
    prompt = np.frombuffer(PROMPT.encode(), np.uint8).astype(np.int32)
    tokens = generated(model, jnp.asarray(prompt)[None], length, **options)[0]
    return bytes(map(int, tokens)).decode(errors="replace")


def test_it_prints_the_prompt_and_what_the_model_adds(folder, small, params, capsys):
    main(["generate", "--model", str(folder), "--prompt", PROMPT, "--length", "20", "--temperature", "0"])
    printed = capsys.readouterr()
    assert printed.out == expected(small, params, 20, key=jax.random.key(0), temperature=0) + "\n"
    assert printed.err.startswith("20 tokens, ") and printed.err.endswith(" tokens/s\n")


@pytest.mark.slow
def test_its_options_reach_the_sampler(folder, small, params, capsys):
    options = ["--temperature", "2", "--top-p", "0.6", "--seed", "5", "--length", "12"]
    main(["generate", "--model", str(folder), "--prompt", PROMPT, *options])
    drawn = capsys.readouterr().out
    assert drawn == expected(small, params, 12, key=jax.random.key(5), temperature=2.0, top_p=0.6) + "\n"
    assert drawn != expected(small, params, 12, key=jax.random.key(5), temperature=2.0) + "\n"


@pytest.mark.slow
def test_a_checkpoint_within_a_run_is_restored(small, folder, params, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    origin = Origin({"dtype": "float32"}, {"name": "tiny", **dataclasses.asdict(small.config)}, "0")
    with open_saver(run / "checkpoints", origin, keep=2) as saver:
        saver.save(1, jax.tree.map(lambda w: -w, params), {"count": jnp.int32(1)}, {}, None)
        saver.save(2, params, {"count": jnp.int32(2)}, {}, None)
    texts = {}
    for name in (run, run / "checkpoints" / "2", run / "checkpoints" / "1"):
        main(["generate", "--model", str(name), "--prompt", PROMPT, "--length", "9", "--seed", "3"])
        texts[name.name] = capsys.readouterr().out
    assert texts["2"] == texts["run"] != texts["1"]
    (run / "model.safetensors").unlink()
    with pytest.raises(SystemExit):
        main(["generate", "--model", str(run), "--prompt", PROMPT])
    assert f"the run has a checkpoint that you can name, {run / 'checkpoints' / '2'}" in capsys.readouterr().err


class Words:
    """Each word is one token, and 0 ends a text; a chat has a mark before each message."""

    vocab_size, eos, stops = 256, 0, (0, 1)

    def encode(self, texts, *, add_special=True):
        ids = [[len(word) for word in text.split()] for text in texts]
        return [type("Encoded", (), {"tokens": np.array(i, np.int32)}) for i in ids]

    def decode(self, tokens):
        return " ".join(str(int(token)) for token in tokens)

    def prompt(self, messages):
        return " ".join(f"<{m['role']}> {m['content']}" for m in messages) + " <assistant>"


@pytest.mark.parametrize("end", [0, 1])
def test_a_chat_is_put_in_its_template_and_stops_at_each_end(small, params, capsys, monkeypatch, end):
    seen = []

    def stream(model, prompt, length, *, key, sampler):
        seen.append((prompt.tolist(), sampler.eos))
        yield from (np.array([token]) for token in (7, 8, end))

    monkeypatch.setattr(generate_module, "load_model", lambda *_: Loaded(small.config, cast(Any, Words()), params))
    monkeypatch.setattr(generate_module, "stream", stream)
    main(["generate", "--model", "any", "--prompt", "hello you", "--chat", "--system", "be kind", "--length", "9"])
    printed = capsys.readouterr()
    assert seen == [([[8, 2, 4, 6, 5, 3, 11]], (0, 1))]
    assert printed.out == "7 8\n"
    assert printed.err.startswith("3 tokens")


@pytest.mark.slow
def test_whoever_reads_it_may_stop(folder):
    """A reader such as head gets what it asked for, and there is no traceback."""
    arguments = ["generate", "--model", str(folder), "--length", "30", "--prompt", PROMPT]
    command = [sys.executable, "-c", f"from adalomo_jax.cli import main; main({arguments})"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        assert process.stdout.read(1) == PROMPT[:1].encode()
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert errors.splitlines()[-1] == "adalomo-jax: nobody reads the output any more" and "BrokenPipe" not in errors


def test_a_token_that_cannot_be_written_is_one_line(small, params, capsys, monkeypatch):
    class Broken(Words):
        def decode(self, tokens):
            if 8 in map(int, tokens):
                raise ValueError("the tokenizer cannot write\nthe tokens")
            return super().decode(tokens)

    monkeypatch.setattr(generate_module, "load_model", lambda *_: Loaded(small.config, cast(Any, Broken()), params))
    monkeypatch.setattr(generate_module, "stream", lambda *_, **__: iter([np.array([7]), np.array([8])]))
    with pytest.raises(SystemExit):
        main(["generate", "--model", "any", "--prompt", "a", "--length", "4"])
    printed = capsys.readouterr()
    assert printed.out == "a 7\n" and printed.err == "adalomo-jax: the tokenizer cannot write the tokens\n"


def test_pieces_are_whole_characters():
    tokens = "aé€!\u20ac".encode()
    assert list(pieces(tokens, ByteTokenizer())) == ["a", "é", "€", "!", "€", ""]
    assert list(pieces(tokens[:-1], ByteTokenizer()))[-1] == "\N{REPLACEMENT CHARACTER}"


class Pieced(ByteTokenizer):
    """Each token is a word with a space before it; a text does not begin with that space."""

    def decode(self, tokens):
        return "".join(f" {int(token)}" for token in tokens).removeprefix(" ")


def test_what_continues_a_text_is_not_read_as_its_beginning():
    assert list(pieces([7, 8], Pieced(), before=[5, 6])) == [" 7", " 8", ""]
    assert list(pieces([7, 8], Pieced())) == ["7", " 8", ""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model {folder} --prompt", "--prompt"),
        ("--model tiny --prompt x", "--model tiny is a preset without weights"),
        ("--model {tmp}/nothing --prompt x", "there is no file or folder"),
        ("--model {tmp} --prompt x", "config.json cannot be read"),
        ("--model smollm --prompt x", "there is no file or folder smollm"),
        ("--model {folder} --prompt x --chat", "bytes have no chat template; leave --chat out"),
        ("--model {folder} --prompt x --system y", "--system needs --chat: give it too"),
        ("--model {folder} --prompt x --length 40", "--prompt (1 tokens) and --length 40 must fit the 40 positions"),
        ("--model {folder} --prompt x --length 0", "--length must be at least 1 token, got 0"),
        ("--model {folder} --prompt x --temperature -1", "--temperature must be 0 (the likeliest token) or more"),
        ("--model {folder} --prompt x --temperature nan", "--temperature must be 0"),
        ("--model {folder} --prompt x --top-p 0", "--top-p must be above 0 and at most 1 (all tokens), got 0.0"),
        ("--model {folder} --prompt x --top-p 1.5", "--top-p must be above 0 and at most 1 (all tokens), got 1.5"),
        ("--model {folder} --prompt x --seed -1", "--seed must be from 0"),
        ("--model {folder} --prompt \udcff", "--prompt must be UTF-8"),
        ("--model {folder} --prompt x --chat --system \udcff", "--system must be UTF-8"),
        ("--model \x1b[31m --prompt x", "--model \\x1b[31m: there is no file or folder"),
        ("--model {folder} --prompt=", "--prompt must be of at least one token, got none"),
    ],
)
@pytest.mark.usefixtures("small")
def test_unusable_input_is_one_line_and_status_2(arguments, message, folder, tmp_path, capsys, monkeypatch):
    def too_early(*_, **__):
        raise AssertionError("generated before the input was checked")

    monkeypatch.setattr(generate_module, "stream", too_early)
    with pytest.raises(SystemExit) as stopped:
        main(["generate", *arguments.format(folder=folder, tmp=tmp_path).split()])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith("adalomo-jax: ") and captured.err.count("\n") == 1
    assert message in captured.err and captured.out == ""
