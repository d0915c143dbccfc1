"""A run continues from a checkpoint to the same bits, or not at all."""

import json
import os
import re
import shutil
import signal

import chex
import numpy as np
import pytest
import tiny
from one_program import refused
from safetensors.numpy import load_file
from tiers import slow

import adalomo_jax.commands.finetune as run_module
import adalomo_jax.training.program as program_module
from adalomo_jax.cli import main
from adalomo_jax.fused.step import FusedStep
from adalomo_jax.models import PRESETS, decoder_of
from adalomo_jax.pretrained.checkpoint import open_checkpoint
from adalomo_jax.pretrained.load import load_params
from adalomo_jax.training.checkpoints.save import Saver, restore_params

STEPS = 6
OPTIONS = ["--batch-size", "8", "--seq-len", "16", "--keep", "3"]


pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def command(corpus):
    return ["finetune", "--data", str(corpus), *OPTIONS, "--steps", str(STEPS)]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    main([*command, "--output", str(folder)])
    return folder


@pytest.fixture
def killed(finished, tmp_path):
    """A copy of the run as it was after step 5, while it wrote the checkpoint and the row of step 6."""
    folder = tmp_path / "killed"
    shutil.copytree(finished, folder)
    for name in ("model.safetensors", "loss.png"):
        (folder / name).unlink()
    (folder / "checkpoints" / "6").rename(folder / "checkpoints" / "6.orbax-checkpoint-tmp")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-10])
    return folder


def steps_in(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def rows(folder):
    """The rows without values that depend on time."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in found]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_run_goes_on_to_the_same_bits(killed, finished, command, capsys):
    """With an evaluation before its first step, too, though the options need not say so again."""
    path, first = killed / "metrics.jsonl", {"step": 0, "eval_loss": 5.5, "perplexity": 244.7}
    path.write_text(json.dumps(first) + "\n" + path.read_text())
    main([*command, "--output", str(killed), "--resume"])
    assert "continuing after step 5\n" in capsys.readouterr().out
    assert weights(killed) == weights(finished)
    assert rows(killed) == [first, *rows(finished)] and len(rows(finished)) == 2 * STEPS
    assert steps_in(killed) == steps_in(finished) == [4, 5, 6]


def test_without_its_place_in_the_data_it_does_not(killed, finished, command, monkeypatch):
    found = run_module.find_checkpoint
    of_first_batch = lambda *args: found(*args)._replace(batches={"next_index": 0})  # pyright: ignore
    monkeypatch.setattr(run_module, "find_checkpoint", of_first_batch)
    main([*command, "--output", str(killed), "--resume"])
    assert weights(killed) != weights(finished)


def test_a_finished_run_says_so(finished, command, capsys):
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    main([*command, "--output", str(finished), "--resume"])
    assert capsys.readouterr().out == f"the run in {finished} is finished\n"
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before


def test_a_finished_run_reads_no_text_unless_it_is_elsewhere(finished, command, corpus, capsys, monkeypatch, tmp_path):
    elsewhere = shutil.copy(corpus, tmp_path / "other.txt")
    resuming = [*command, "--output", str(finished), "--resume"]
    main([*resuming, "--data", str(elsewhere)])
    assert capsys.readouterr().out == f"the run in {finished} is finished\n"
    monkeypatch.setattr(run_module, "load_data", None)
    main(resuming)


def test_a_finished_run_of_other_options_is_refused(finished, command, capsys, tmp_path):
    (tmp_path / "other.txt").write_text("another text\n" * 500)
    options = ["--steps", "12", "--data", str(tmp_path / "other.txt")]
    said = refused(capsys, [*command, "--output", str(finished), "--resume", *options])
    assert f"the checkpoint of step 6 in {finished} is of a run with other options: --steps was 6, and is 12" in said
    assert "--data gave the sequences" in said and "name another --output" in said


def test_a_finished_run_goes_back(finished, command, capsys, tmp_path, monkeypatch):
    folder, earlier = shutil.copytree(finished, tmp_path / "run"), tmp_path / "run" / "earlier-model.safetensors"
    resuming = [*command, "--output", str(folder), "--resume"]
    said = refused(capsys, [*resuming, "--resume-step", "3"])
    assert "only those of the steps 4, 5, 6" in said and weights(folder) == weights(finished)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(run_module, "append_row", killed)
        main([*resuming, "--resume-step", "4"])
    assert steps_in(folder) == [4] and earlier.read_bytes() == weights(finished)
    capsys.readouterr()
    main(resuming)
    assert "continuing after step 4\n" in capsys.readouterr().out
    assert weights(folder) == weights(finished) and rows(folder) == rows(finished) and not earlier.exists()
    main(resuming)
    assert capsys.readouterr().out == f"the run in {folder} is finished\n"


def test_without_a_checkpoint_it_begins(killed, finished, command, capsys):
    shutil.rmtree(killed / "checkpoints")
    main([*command, "--output", str(killed), "--resume"])
    assert f"continuing from the beginning: there is no checkpoint in {killed}\n" in capsys.readouterr().out
    assert weights(killed) == weights(finished) and rows(killed) == rows(finished)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_a_model_is_no_run_to_go_on_with(name, command, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(run_module, "build_program", None)
    for file in (name, "config.json"):
        (tmp_path / file).write_text("of somebody")
    said = refused(capsys, [*command, "--output", str(tmp_path), "--resume"])
    assert f"{tmp_path} is no folder of a run, it holds {name} and no metrics.jsonl; name another --output" in said


@pytest.mark.slow
def test_a_new_run_may_lie_beside_other_files(finished, command, tmp_path):
    (tmp_path / "notes.bin").write_text("of somebody")
    main([*command, "--output", str(tmp_path)])
    assert weights(tmp_path) == weights(finished) and (tmp_path / "notes.bin").exists()


def test_a_run_killed_before_its_first_row_begins_again(finished, command, capsys, monkeypatch, tmp_path):
    shutil.copy(finished / "config.json", tmp_path)
    main([*command, "--output", str(tmp_path), "--resume"])
    assert weights(tmp_path) == weights(finished)


def test_a_run_is_not_written_over(killed, command, capsys):
    assert "holds a run already" in (said := refused(capsys, [*command, "--output", str(killed)])), said
    assert "go on with --resume" in said


def test_all_options_that_differ_are_named(killed, command, corpus, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "build_program", None)
    (tmp_path / "other.txt").write_text(corpus.read_text().replace("line", "Line"))
    options = ["--seed", "1", "--learning-rate", "0.5", "--steps", "7", "--data", str(tmp_path / "other.txt")]
    said = refused(capsys, [*command, "--output", str(killed), "--resume", *options])
    assert "of step 5" in said and "other options" in said
    for part in ("--seed was 0, and is 1;", "--learning-rate was 0.03, and is 0.5;", "--steps was 6, and is 7;"):
        assert part in said, said
    assert re.search(r"--data gave the sequences [0-9a-f]{12}, and gives [0-9a-f]{12};", said)
    monkeypatch.setitem(PRESETS, "tiny", tiny.dataclasses.replace(tiny.TINY, num_hidden_layers=3))
    said = refused(capsys, [*command, "--output", str(killed), "--resume"])
    assert "--model: its num_hidden_layers was 2, and is 3; give the same ones" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--resume", "--resume continues the run in --output: name its folder"),
        ("--resume-step 3", "--resume-step needs --resume: give it too"),
        ("--resume --output {0} --resume-step 3", "no checkpoint of this step, only those of the steps 4, 5"),
        ("--resume --output {0}/none --resume-step 3", "no checkpoint of this step, none at all"),
        ("--checkpoint-every -1", "--checkpoint-every must be 0 (no checkpoints) or a number of steps, got -1"),
        ("--keep 0", "--keep must be at least 1 checkpoint, got 0"),
    ],
)
def test_what_cannot_be_resumed(options, says, killed, command, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(run_module, "build_program", None)
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, [*command, *options.format(killed).split()])


def test_a_damaged_checkpoint_is_named_and_an_older_one_taken_when_asked(killed, finished, command, capsys):
    newest = killed / "checkpoints" / "5"
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    resuming = [*command, "--output", str(killed), "--resume"]
    before = (killed / "metrics.jsonl").read_bytes()
    said = refused(capsys, resuming)
    assert f"the checkpoint of step 5 in {killed} is damaged: " in said
    assert "; older ones are of the steps 4; to take one, give --resume-step 4\n" in said
    assert (killed / "metrics.jsonl").read_bytes() == before and newest.exists()
    main([*resuming, "--resume-step", "4"])
    assert weights(killed) == weights(finished) and rows(killed) == rows(finished)


def test_a_broken_line_of_the_metrics_is_named(killed, finished, command, capsys, monkeypatch):
    path = killed / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "{broken\n", *lines[2:]]))
    resuming = [*command, "--output", str(killed), "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "build_program", None)
        said = refused(capsys, resuming)
    assert f"{path}:3 is no row of a run: " in said and "remove what is broken there" in said
    path.write_text("".join(lines))
    main(resuming)
    assert rows(killed) == rows(finished)


@pytest.mark.parametrize(
    "of_rows", [lambda rows: rows[:3] + rows[4:], lambda rows: rows[:4] + rows[3:], lambda rows: []]
)
def test_metrics_that_are_not_of_the_run_are_refused(of_rows, killed, command, capsys):
    path = killed / "metrics.jsonl"
    path.write_text("".join(of_rows(path.read_text().splitlines(keepends=True))))
    said = refused(capsys, [*command, "--output", str(killed), "--resume"])
    assert f"{path} must continue with the " in said and "put the file of that run back" in said


def test_checkpoints_alone_say_what_to_copy_too(killed, command, capsys):
    (killed / "metrics.jsonl").unlink()
    said = refused(capsys, [*command, "--output", str(killed), "--resume"])
    assert "has checkpoints and no metrics.jsonl, whose rows the run continues: copy it there, too" in said


@pytest.mark.parametrize("at", [slow(0), 1, slow(2)])
def test_a_kill_while_a_run_goes_back_loses_no_rows(at, finished, command, tmp_path, monkeypatch):
    """The kill comes before one of the later checkpoints goes, the last first, or before the rows are cut."""
    folder, calls = shutil.copytree(finished, tmp_path / "run"), []

    def killed():
        calls.append(1)
        if len(calls) > at:
            raise KeyboardInterrupt

    rename, write_rows = type(folder).rename, run_module.write_rows
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(type(folder), "rename", lambda *args: killed() or rename(*args))
        patch.setattr(run_module, "write_rows", lambda *args: killed() or write_rows(*args))
        main([*command, "--output", str(folder), "--resume", "--resume-step", "4"])
    left = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
    assert left == [4, 5, 6][: 3 - at] and rows(folder) == rows(finished)
    main([*command, "--output", str(folder), "--resume"])
    assert rows(folder) == rows(finished) and weights(folder) == weights(finished)


@pytest.mark.parametrize("name", ["model.safetensors", "summary.json"])
def test_a_run_is_finished_by_whole_weights_and_its_summary(name, finished, command, capsys, tmp_path):
    """Otherwise the run writes them again from the last checkpoint."""
    folder = shutil.copytree(finished, tmp_path / "run")
    if name == "summary.json":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(weights(folder)[:-1])
    main([*command, "--output", str(folder), "--resume"])
    assert "continuing after step 6\n" in capsys.readouterr().out
    assert weights(folder) == weights(finished) and rows(folder) == rows(finished) and (folder / name).exists()


def test_a_foreign_folder_is_no_checkpoint(killed, command, capsys):
    shutil.rmtree(killed / "checkpoints" / "4")
    foreign = killed / "checkpoints" / "9"
    (foreign / "somewhat").mkdir(parents=True)
    for options in ([], ["--resume-step", "5"]):
        said = refused(capsys, [*command, "--output", str(killed), "--resume", *options])
        assert f"{foreign} has no record of a run" in said and "move it out" in said
    shutil.rmtree(foreign)
    (killed / "checkpoints" / "5").rename(foreign)
    said = refused(capsys, [*command, "--output", str(killed), "--resume"])
    assert "it says that it is of the step 5; there is no older one; start again in another --output" in said


@pytest.mark.slow
def test_a_resumed_run_makes_no_weights_of_its_own(killed, finished, command, monkeypatch):
    """It compiles the same step from the restored arrays; the other tests' runs share one step."""

    def made(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(run_module, "build_program", program_module.build_program)
    monkeypatch.setattr(program_module, "_first_params", made)
    monkeypatch.setattr(FusedStep, "init", made)
    main([*command, "--output", str(killed), "--resume"])
    assert weights(killed) == weights(finished) and rows(killed) == rows(finished)


@pytest.mark.parametrize(
    ("first", "then"),
    [slow([], ["--no-fused"]), slow(["--no-fused"], [])],
    ids=lambda options: " ".join(options) or "fused",
)
def test_a_checkpoint_moves_between_steps(first, then, command, finished, tmp_path):
    if first:
        main([*command, *first, "--output", str(tmp_path / "run")])
    else:
        shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    main([*command, *then, "--output", str(tmp_path / "run"), "--resume", "--resume-step", "4"])
    losses = lambda folder: np.array([row.get("loss", row.get("eval_loss", 0)) for row in rows(folder)])
    assert len(losses(finished)) == 2 * STEPS
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(finished), rtol=1e-5)


def test_sigterm_saves_and_stops(finished, command, tmp_path, capsys, monkeypatch):
    append, folder = run_module.append_row, tmp_path / "run"

    def terminated(path, row):
        append(path, row)
        if row.step == 3 and not hasattr(row, "eval_loss"):
            os.kill(os.getpid(), signal.SIGTERM)

    quiet = [*command, "--checkpoint-every", "100", "--output", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "append_row", terminated)
        said = refused(capsys, quiet, status=143)
    assert said == (
        "adalomo-jax: stopped after step 3, which is saved; to go on, give the same options with "
        f"--output {folder} --resume\n"
    )
    assert steps_in(folder) == [3] and not (folder / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    main([*quiet, "--resume"])
    assert weights(folder) == weights(finished) and rows(folder) == rows(finished)


def test_a_second_sigterm_does_not_stop_the_save(command, tmp_path, capsys, monkeypatch):
    append, wait, deaths = run_module.append_row, Saver.wait, []

    def terminated(path, row):
        append(path, row)
        if row.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def waiting(saver):
        os.kill(os.getpid(), signal.SIGTERM)
        wait(saver)

    monkeypatch.setattr(run_module, "append_row", terminated)
    monkeypatch.setattr(Saver, "wait", waiting)
    # The default handler would end the tests.
    previous = signal.signal(signal.SIGTERM, lambda *_: deaths.append("while saving"))
    try:
        refused(capsys, [*command, "--checkpoint-every", "100", "--output", str(tmp_path / "run")], status=143)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert not deaths and steps_in(tmp_path / "run") == [2]


def test_without_checkpoints(command, tmp_path):
    main([*command, "--output", str(tmp_path / "run"), "--checkpoint-every", "0"])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_parameters_alone(finished):
    params, config = restore_params(finished / "checkpoints" / "6")
    exported = open_checkpoint(finished)
    assert config == exported.config == tiny.TINY
    chex.assert_trees_all_equal(params, load_params(exported.config, exported.source, "float32"))
    model = decoder_of(config, params)
    assert load_file(finished / "model.safetensors")["model.norm.weight"].shape == model.norm.weight.shape
    with pytest.raises(ValueError, match="there is no folder .*checkpoints/7"):
        restore_params(finished / "checkpoints" / "7")
