"""The command: what it leaves, and how it refuses."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import adalomo_jax.finetune.run as run_module
from adalomo_jax.cli import main
from adalomo_jax.finetune.data import evaluation_batches, load_text
from adalomo_jax.models import PRESETS, Llama, next_token_loss

SMALL = ["--steps", "6", "--batch-size", "2", "--seq-len", "32", "--warmup-steps", "2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"line {i} of a text that repeats itself\n" * 40)
    return folder


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["finetune", "--data", str(corpus), "--output", str(folder), *SMALL])
    return folder


def read_metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]


def model_from(folder):
    """The model, from the exported files alone."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    module = Llama(PRESETS["tiny"], rngs=nnx.Rngs(0))

    def value(path, layer=None):
        name = ".".join(path).replace(".kernel", ".weight").replace(".embedding", ".weight")
        tensor = tensors.pop(name)
        return tensor.T if path[-1] == "kernel" else tensor

    state = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
    for path, variable in state.items():
        if path[0] == "layers":
            layers = [value(("model", "layers", str(i), *path[1:])) for i in range(config["num_hidden_layers"])]
            new = np.stack(layers)
        else:
            new = value(path if path[0] == "lm_head" else ("model", *path))
        assert new.shape == variable.shape
        variable[...] = jnp.asarray(new)
    assert not tensors, "every exported tensor belongs to the model"
    nnx.update(module, nnx.from_flat_state(state))
    return module


def test_a_run_leaves_its_files_and_no_others(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "config.json",
        "loss.png",
        "metrics.jsonl",
        "model.safetensors",
    ]
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_metrics_have_all_steps_and_a_falling_loss(finished):
    steps, evaluations = read_metrics(finished)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in evaluations] == [0, 1, 2, 3, 4, 5, 6]
    assert set(steps[0]) == {"step", "loss", "grad_norm", "learning_rate", "tokens_per_second"}
    assert 5.3 < evaluations[0]["eval_loss"] < 5.8
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 0.3
    assert all(row["grad_norm"] > 0 and row["tokens_per_second"] > 0 for row in steps)


def test_exported_weights_are_the_trained_ones(finished, corpus):
    _, evaluations = read_metrics(finished)
    tokens = jnp.asarray(evaluation_batches(load_text([corpus], 32), batch_size=2, seq_len=32).reshape(-1, 32))
    model = model_from(finished)
    loss = nnx.jit(next_token_loss)
    np.testing.assert_allclose(loss(model, tokens), evaluations[-1]["eval_loss"], rtol=1e-5)
    model.layers.mlp.up_proj.kernel[...] = model.layers.mlp.up_proj.kernel[...][::-1]
    assert abs(float(loss(model, tokens)) - evaluations[-1]["eval_loss"]) > 1e-4


def test_fused_and_unfused_train_alike(finished, corpus, tmp_path):
    main(["finetune", "--data", str(corpus), "--output", str(tmp_path / "run"), *SMALL, "--no-fused"])
    losses, other = ([row["loss"] for row in read_metrics(folder)[0]] for folder in (finished, tmp_path / "run"))
    np.testing.assert_allclose(losses, other, rtol=1e-4)


def test_another_seed_in_bfloat16_trains_otherwise(finished, corpus, tmp_path):
    options = ["--seed", "1", "--dtype", "bfloat16"]
    main(["finetune", "--data", str(corpus), "--output", str(tmp_path / "run"), *SMALL, *options])
    assert {str(t.dtype) for t in load_file(tmp_path / "run" / "model.safetensors").values()} == {"bfloat16"}
    losses, other = ([row["loss"] for row in read_metrics(folder)[0]] for folder in (finished, tmp_path / "run"))
    assert not np.allclose(losses, other, rtol=1e-4)


@pytest.fixture
def places(tmp_path, corpus, finished):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "binary.bin").write_bytes(b"\0" * 1000)
    (tmp_path / "folder").mkdir()
    return {"tmp": tmp_path, "corpus": corpus, "finished": finished}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model tinny", "unknown model 'tinny'; did you mean tiny? presets: tiny,"),
        ("--model llama-2-7", "did you mean llama-2-7b?"),
        ("--data {tmp}/missing.txt", "missing.txt: no such file or folder"),
        ("--data {tmp}/empty.txt", "empty.txt is empty"),
        ("--data {tmp}/folder", "folder holds no text files"),
        ("--data {tmp}/binary.bin", "binary.bin is not text"),
        ("--data {tmp}/short.txt", "fewer than one sequence"),
        ("--seq-len 513", "--seq-len 513 is longer than the 512 positions of tiny"),
        ("--seq-len 1", "--seq-len must be at least 2"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--batch-size 0", "--batch-size must be at least 1"),
        ("--learning-rate 0", "--learning-rate must be above 0, got 0.0"),
        ("--learning-rate -1e-3", "--learning-rate must be above 0, got -0.001"),
        ("--learning-rate nan", "--learning-rate must be above 0, got nan"),
        ("--steps 5 --warmup-steps 6", "--warmup-steps must be from 0 to the 5 of --steps, got 6"),
        ("--weight-decay -1", "--weight-decay must be 0 or more"),
        ("--seed -1", "--seed must be from 0"),
        ("--output {finished}", "holds a run already"),
        ("--output {tmp}/short.txt", "is a file, not a folder"),
        ("--output {tmp}/short.txt/run", "cannot be created"),
    ],
)
def test_unusable_input_is_one_line_and_status_2(arguments, message, places, capsys, monkeypatch):
    def compiled_too_early(config):
        raise AssertionError("compiled before the input was checked")

    monkeypatch.setattr(run_module, "build_program", compiled_too_early)
    monkeypatch.chdir(places["tmp"])
    before = sorted(places["tmp"].rglob("*"))
    options = arguments.format(**places).split()
    if "--data" not in options:
        options += ["--data", str(places["corpus"])]
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", *options])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith("adalomo-jax: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""
    assert sorted(places["tmp"].rglob("*")) == before


def test_good_input_does_compile(places, monkeypatch):
    monkeypatch.setattr(run_module, "build_program", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["finetune", "--data", str(places["corpus"]), "--output", str(places["tmp"] / "run")])


def test_an_interrupt_leaves_no_weights(corpus, tmp_path, capsys, monkeypatch):
    def interrupted(program, config, text, on_row):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "build_program", lambda config: None)
    monkeypatch.setattr(run_module, "train", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", "--data", str(corpus), "--output", str(tmp_path / "run"), *SMALL])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "adalomo-jax: interrupted\n"
    assert list((tmp_path / "run").iterdir()) == []


def test_help_names_every_option_and_preset():
    command = [sys.executable, "-m", "adalomo_jax", "finetune", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in (*PRESETS, "--data", "--steps", "--no-fused", "--dtype", "--output"):
        assert name in text
