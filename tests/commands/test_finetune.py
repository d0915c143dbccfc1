"""The command finetune leaves the files of a run, and refuses wrong input."""

import contextlib
import dataclasses
import io
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from one_program import draw_nothing, keeping_programs
from safetensors.numpy import load_file, save_file
from tiers import slow

import adalomo_jax.commands.finetune as run_module
from adalomo_jax.cli import main
from adalomo_jax.memory.usage import format_bytes
from adalomo_jax.models import PRESETS, decoder_of, next_token_loss
from adalomo_jax.pretrained import ByteTokenizer
from adalomo_jax.pretrained.checkpoint import open_checkpoint
from adalomo_jax.pretrained.load import load_params
from adalomo_jax.rules import RULES
from adalomo_jax.run_files import RUN_FILES
from adalomo_jax.text.batches import evaluation_batches
from adalomo_jax.text.data import load_data

SMALL = ["--steps", "6", "--batch-size", "2", "--seq-len", "32", "--warmup-steps", "2"]


@pytest.fixture(autouse=True, scope="module")
def programs():
    """Runs that need the same program compile it once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "build_program", keeping_programs())
        yield


@pytest.fixture
def undrawn(monkeypatch):
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"line {i} of a text that repeats itself\n" * 40)
    return folder


@pytest.fixture(scope="module")
def finished_run(corpus, tmp_path_factory):
    """The folder of a run and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        main(["finetune", "--data", str(corpus), "--output", str(folder), "--evaluate-first", *SMALL])
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def finished(finished_run):
    return finished_run[0]


def data_of(corpus):
    return load_data([corpus], ByteTokenizer(), seq_len=32)


def read_metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]


def model_from(folder):
    """The model, loaded from the exported files alone."""
    found = open_checkpoint(folder)
    params = load_params(found.config, found.source, "float32")
    return decoder_of(found.config, params)


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_leaves_its_files_and_no_others(finished):
    *named, events = sorted(files_of(finished), key=lambda name: name.startswith("events."))
    assert sorted(named) == sorted(RUN_FILES)
    assert events.startswith("events.out.tfevents.")
    for picture in ("loss.png", "run.png"):
        assert (finished / picture).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_metrics_have_all_steps_and_a_falling_loss(finished):
    steps, evaluations = read_metrics(finished)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in evaluations] == [0, 1, 2, 3, 4, 5, 6]
    assert set(steps[0]) == {"step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "update_rms"}
    assert len(steps[0]["update_rms"]["layers/mlp/up_proj/kernel"]) == 4
    assert steps[0]["update_rms"]["embed_tokens/embedding"] > 0
    assert 5.3 < evaluations[0]["eval_loss"] < 5.8
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 0.3
    assert all(row["grad_norm"] > 0 and row["tokens_per_second"] > 0 for row in steps)


def test_a_run_prints_its_progress_a_sample_and_its_figures(finished_run, corpus):
    folder, printed = finished_run
    _, evaluations = read_metrics(folder)
    for row in evaluations:
        assert (
            f"step {row['step']:>6}  evaluation loss {row['eval_loss']:.3f}  perplexity {row['perplexity']:.2f}\n"
            in printed
        )
    assert re.search(r"6/6 .*loss \d\.\d{3}  [\d,]+ tokens/s  \d+\.\d\d [MG]B", printed)

    first = data_of(corpus).evaluation.take(np.array(0)).tokens_BT
    prompt = bytes(first[:8].tolist()).decode()
    before, bar, after = printed.partition(f"\n{prompt}|")
    title = "tiny, adalomo, fused, float32"
    assert bar and title not in before and after.partition(title)[0].strip()

    weights = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    figures = {
        "evaluation loss (nats a token)": f"{evaluations[0]['eval_loss']:.3f} to {evaluations[-1]['eval_loss']:.3f}",
        "training tokens a second": r"[1-9][\d,]*",
        "peak memory of this process": r"\d+\.\d\d [MG]B",
        "compiled step: arguments, outputs, temporaries": r"\d+\.\d\d MB",
        "parameters": format_bytes(weights),
        "optimizer state": r"\d+\.\d\d kB",
        "gradients alive at once": r"\d+\.\d\d kB",
    }
    for label, figure in figures.items():
        assert re.search(rf"{re.escape(label)} +\S +{figure} ", after.partition(title)[2]), label
    assert f"written to {folder}\n" in after


def test_the_summary_is_what_the_metrics_say(finished):
    summary, (_, evaluations) = json.loads((finished / "summary.json").read_text()), read_metrics(finished)
    assert [summary["first_eval_loss"], summary["eval_loss"]] == [evaluations[i]["eval_loss"] for i in (0, -1)]
    assert evaluations[-1]["perplexity"] == pytest.approx(math.exp(evaluations[-1]["eval_loss"]))
    assert 0 < summary["state_bytes"] < summary["params_bytes"] < summary["compiled_bytes"] < summary["process_bytes"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "options",
    [
        slow({"optimizer": "lomo", "schedule": "linear", "dtype": "bfloat16"}),
        slow({"optimizer": "adamw", "schedule": "constant", "fused": False, "update_rms": False}),
        slow({"optimizer": "adafactor", "schedule": "linear", "update_rms": False}),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_options_reach_the_run(options, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(tiny.TINY, tie_word_embeddings=True))
    flags = [f"--{name}={value}" for name, value in options.items() if value is not False]
    flags += [f"--no-{name.replace('_', '-')}" for name, value in options.items() if value is False]
    small = ["--data", str(corpus), "--steps", "2", "--batch-size", "1", "--seq-len", "8"]
    main(["finetune", *small, *flags, "--output", str(tmp_path / "run")])
    assert sorted(name for name in files_of(tmp_path / "run") if not name.startswith("events.")) == sorted(RUN_FILES)
    steps, evaluations = read_metrics(tmp_path / "run")
    assert [row["step"] for row in steps] == [row["step"] for row in evaluations] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in steps)
    assert all(("update_rms" in row) == options.get("update_rms", True) for row in steps)
    assert all(math.isfinite(row["eval_loss"]) for row in evaluations)
    second = 1 if options["schedule"] == "constant" else 0.5
    peak = RULES[options["optimizer"]].random_rate
    np.testing.assert_allclose([row["learning_rate"] for row in steps], [peak, second * peak], rtol=1e-5)
    how = "fused" if options.get("fused", True) else "unfused"
    dtype = options.get("dtype", "float32")
    assert f"tiny, {options['optimizer']}, {how}, {dtype}" in capsys.readouterr().out
    assert {str(t.dtype) for t in load_file(tmp_path / "run" / "model.safetensors").values()} == {dtype}


def test_exported_weights_are_the_trained_ones(finished, corpus):
    _, evaluations = read_metrics(finished)
    batches = evaluation_batches(data_of(corpus), batch_size=2)
    tokens, segments, learned = jax.tree.map(lambda x: jnp.asarray(x.reshape(-1, 32)), batches)
    model = model_from(finished)
    loss = lambda: nnx.jit(next_token_loss)(model, tokens, learned, segments)
    np.testing.assert_allclose(loss(), evaluations[-1]["eval_loss"], rtol=1e-5)
    model.layers.mlp.up_proj.kernel[...] = model.layers.mlp.up_proj.kernel[...][::-1]
    assert abs(float(loss()) - evaluations[-1]["eval_loss"]) > 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_fused_and_unfused_train_alike(finished, corpus, tmp_path):
    """The fast tier checks this too: there, one run continues from the other's checkpoint."""
    main(["finetune", "--data", str(corpus), "--output", str(tmp_path / "run"), *SMALL, "--no-fused"])
    losses, other = ([row["loss"] for row in read_metrics(folder)[0]] for folder in (finished, tmp_path / "run"))
    np.testing.assert_allclose(losses, other, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_another_seed_trains_otherwise(finished, corpus, tmp_path):
    main(["finetune", "--data", str(corpus), "--output", str(tmp_path / "run"), *SMALL, "--seed", "1"])
    losses, other = ([row["loss"] for row in read_metrics(folder)[0]] for folder in (finished, tmp_path / "run"))
    assert not np.allclose(losses, other, rtol=1e-4)


@pytest.fixture
def places(tmp_path, corpus, finished):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "binary.bin").write_bytes(b"\0" * 1000)
    (tmp_path / "folder").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copy(finished / "config.json", broken)
    tensors = load_file(finished / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors")
    return {"tmp": tmp_path, "corpus": corpus, "finished": finished}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model tinny", "unknown model 'tinny'; did you mean tiny? presets: tiny,"),
        ("--model llama-2-7", "did you mean llama-2-7b?"),
        ("--data {tmp}/missing.txt", "missing.txt: no such file or folder"),
        ("--data", "--data must be followed by files or folders"),
        ("--data {tmp}/empty.txt", "empty.txt is empty"),
        ("--data {tmp}/folder", "folder holds no text files"),
        ("--data {tmp}/binary.bin", "binary.bin is not text"),
        ("--data {tmp}/short.txt", "less than one sequence"),
        ("--seq-len 513", "--seq-len 513 is longer than the 512 positions of tiny"),
        ("--seq-len 1", "--seq-len must be at least 2"),
        ("--steps 0", "--steps must be from 1 to 2147483647, because they are counted in 32 bits, got 0"),
        ("--batch-size 0", "--batch-size must be at least 1"),
        (
            "--batch-size 6 --microbatches 4",
            "--microbatches must be at least 1 and divide the 6 of --batch-size, got 4",
        ),
        ("--learning-rate 0", "--learning-rate must be above 0, got 0.0"),
        ("--learning-rate -1e-3", "--learning-rate must be above 0, got -0.001"),
        ("--learning-rate nan", "--learning-rate must be above 0, got nan"),
        ("--steps 5 --warmup-steps 6", "--warmup-steps must be from 0 to the 5 of --steps, got 6"),
        ("--weight-decay -1", "--weight-decay must be 0 or more"),
        ("--max-grad-norm 0", "--max-grad-norm must be above 0, got 0.0"),
        ("--evaluate-every 0", "--evaluate-every must be at least 1 step, got 0"),
        ("--model {tmp}/missing", "missing: there is no file or folder"),
        ("--model {corpus}", "config.json cannot be read"),
        ("--model {tmp}/broken", "the tensors must be those of the model's sizes; 1 missing: model.norm.weight"),
        ("--seed -1", "--seed must be from 0"),
        ("--find-lr --learning-rate 1e-3", "--find-lr looks for the learning rate: leave --learning-rate out"),
        ("--output {finished}", "holds a run already"),
        ("--output {tmp}/short.txt", "is a file, not a folder"),
        ("--output {tmp}/short.txt/run", "cannot be created"),
    ],
)
def test_unusable_input_is_one_line_and_status_2(arguments, message, places, capsys, monkeypatch):
    def compiled_too_early(*_, **__):
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


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_sample_that_fails_costs_no_weights(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "sample", lambda *_: 1 / 0)
    main(["finetune", "--data", str(corpus), *SMALL, "--output", str(tmp_path / "run")])
    said = "adalomo-jax: warning: no sample of text could be made: division by zero\n"
    assert model_from(tmp_path / "run") is not None and capsys.readouterr().err == said


def test_good_input_does_compile(places, monkeypatch):
    monkeypatch.setattr(run_module, "build_program", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["finetune", "--data", str(places["corpus"]), "--output", str(places["tmp"] / "run")])


def test_an_interrupt_leaves_no_weights(corpus, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "build_program", lambda *_, **__: None)
    monkeypatch.setattr(run_module, "train", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", "--data", str(corpus), "--output", str(tmp_path / "run"), *SMALL])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "adalomo-jax: interrupted\n"
    assert set(files_of(tmp_path / "run")) - {"checkpoints"} == {"config.json"}
