"""An error of the system is reported in one line, and nothing that was written is lost."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from one_program import refused, tiny_programs
from tiers import slow

import adalomo_jax.commands.finetune as run_module
import adalomo_jax.training.tensorboard as tensorboard
from adalomo_jax.cli import main
from adalomo_jax.commands.failures import reason_of
from adalomo_jax.inputs import InputError
from adalomo_jax.models import PRESETS
from adalomo_jax.training.config import FinetuneConfig
from adalomo_jax.training.metrics import StepRow, append_row
from adalomo_jax.training.plots import plot_losses, plot_run, plot_runs
from adalomo_jax.training.program import check_attention

OPTIONS = ["--batch-size", "8", "--seq-len", "16", "--steps", "4"]


@pytest.fixture(autouse=True, scope="module")
def small():
    with tiny_programs():
        yield


@pytest.fixture
def command(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text that goes on\n" for i in range(200)))
    return ["finetune", "--data", str(tmp_path / "text.txt"), *OPTIONS, "--output", str(tmp_path / "run")]


ERRORS = [errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.ESTALE, errno.ENOSPC]


@pytest.mark.parametrize("number", [ERRORS[0], *map(slow, ERRORS[1:])], ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("of", ["append_row", slow("export_params"), slow("write_whole")])
def test_a_write_that_fails_is_one_line_and_the_run_goes_on(of, number, command, tmp_path, capsys, monkeypatch):
    """The first write fails: that of a row, of the weights, or of the summary."""

    def fails(*args, **_):
        raise OSError(number, os.strerror(number), str(tmp_path / "run" / "file"))

    with monkeypatch.context() as patch:
        patch.setattr(run_module, of, fails)
        if of == "append_row":  # the second call fails: the first creates the file
            calls = []
            patch.setattr(run_module, of, lambda *args: fails() if calls else calls.append(append_row(*args)))
        said = refused(capsys, command)
    folder = tmp_path / "run"
    assert f"the run in {folder} has failed: {os.strerror(number)}: {folder}/file; mend that" in said
    assert said.endswith(f"give the same command with --output {folder} --resume\n")
    main([*command, "--resume"])
    assert (folder / "model.safetensors").exists() and (folder / "summary.json").exists()


def test_a_checkpoint_that_fails_says_so_itself(command, capsys, monkeypatch):
    """TensorStore's message about a full disk begins like XLA's message about memory."""

    def fails(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", fails)
    said = refused(capsys, command)
    assert "could not be written: the disk is full" in said and "memory" not in said


def test_other_words_for_full_disks_and_memory():
    rust = type("SafetensorError", (Exception,), {})("Error while serializing: I/O error: File too large (os error 27)")
    assert str(reason_of(rust)).startswith("File too large: Error while serializing")
    assert "there is not enough memory (RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes" in str(
        reason_of(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes."))
    )
    wrapped = RuntimeError("while writing")
    wrapped.__cause__ = OSError(errno.EDQUOT, "x", "/data/run")
    assert reason_of(wrapped) == "Disk quota exceeded: /data/run"
    of_disk = RuntimeError("RESOURCE_EXHAUSTED: Error writing: No space left on device")
    assert reason_of(of_disk) == "RESOURCE_EXHAUSTED: Error writing: No space left on device"
    assert reason_of(MemoryError()) is not None and reason_of(KeyError("x")) is None


@pytest.mark.parametrize("of", ["plot_losses", "plot_run"])
def test_a_picture_that_fails_is_a_warning(of, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_module, of, lambda *_: 1 / 0)
    main(command)
    name = {"plot_losses": "loss.png", "plot_run": "run.png"}[of]
    assert capsys.readouterr().err == f"adalomo-jax: warning: {name} could not be drawn: division by zero\n"
    assert (tmp_path / "run" / "model.safetensors").exists() and (tmp_path / "run" / "summary.json").exists()


def test_tensorboard_that_fails_is_one_warning(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tensorboard, "scalars", lambda row: 1 / 0)
    main(command)
    said = "adalomo-jax: warning: TensorBoard's file could not be written, and ends here: division by zero\n"
    assert capsys.readouterr().err == said and (tmp_path / "run" / "model.safetensors").exists()


NAMES = ["$x_", "a$b$c", "_x", "100%", "{x}", "[red]x", "naïve 模型 \U0001f600", r"\alpha$\frac$", "a\nb"]


@pytest.mark.parametrize("name", [NAMES[0], *map(slow, NAMES[1:])])
def test_names_are_drawn_as_they_are(name, tmp_path, recwarn):
    rows = [StepRow(1, 2.0, 1.0, 1e-3, 1.0, {"layers/kernel": [1.0, 2.0]}), StepRow(2, 1e308, np.inf, 1e-3, 1.0)]
    plot_losses(tmp_path / "a.png", rows, name)
    plot_run(tmp_path / "b.png", rows, name)
    plot_runs(tmp_path / "c.png", {name: rows, f"{name}2": rows})
    assert len(list(tmp_path.iterdir())) == 3 and not recwarn.list


HOSTILE_ROWS = [
    '{"step": "1", "eval_loss": 2.0, "perplexity": 1.0}',
    '{"step": 1, "eval_loss": "2.0", "perplexity": 1.0}',
    '{"step": [1], "eval_loss": 2.0, "perplexity": 1.0}',
    '{"step": 1' + "0" * 400 + ', "eval_loss": 2.0, "perplexity": 1.0}',
    '{"step": -1, "eval_loss": 2.0, "perplexity": 1.0}',
    '{"step": 1, "eval_loss": 2.0}',
    '{"step": true, "eval_loss": 2.0, "perplexity": 1.0}',
    "[" * 100_000,
    "3",
    "null",
]


@pytest.mark.parametrize("row", HOSTILE_ROWS, ids=lambda row: row[:30])
def test_rows_that_are_none_are_named(row, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(row + "\n")
    said = refused(capsys, ["plot", str(tmp_path), "--output", str(tmp_path / "x.png")])
    assert f"{tmp_path}/metrics.jsonl:1 is no row of a run: " in said and len(said) < 400


def test_a_model_whose_loss_is_not_finite_is_not_trained(command, tmp_path, capsys, monkeypatch):
    build = run_module.build_program
    broken = lambda *args, **options: build(*args, **options)._replace(evaluate=lambda *_: np.float32("nan"))
    monkeypatch.setattr(run_module, "build_program", broken)
    said = refused(capsys, [*command, "--evaluate-first"])
    assert "the evaluation loss before training is nan: the model's weights or sizes" in said
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 0, "eval_loss": None, "perplexity": None}]


def test_cudnn_takes_no_capped_scores():
    config = FinetuneConfig(model="gemma-2-2b", attention="cudnn")
    with pytest.raises(InputError, match="--attention cudnn takes no capped scores, and gemma-2-2b has them"):
        check_attention(config, PRESETS["gemma-2-2b"], "gpu")
    check_attention(config, PRESETS["gemma-3-4b"], "gpu")


def test_kernels_of_other_machines_are_refused(command, capsys):
    assert "--attention cudnn needs an NVIDIA GPU, and this is a cpu; leave it out" in refused(
        capsys, [*command, "--attention", "cudnn"]
    )
    assert "--attention splash needs a TPU" in refused(capsys, [*command, "--attention", "splash"])


@pytest.mark.parametrize("options", ["--steps 1000000000000", f"--steps 1{'0' * 31}", "--batch-size 1000000000"])
def test_more_than_32_bits_count_is_refused(options, command, capsys):
    said = refused(capsys, [*command, *options.split()])
    assert "because they are counted in 32 bits" in said or "must be less than 2**31 tokens" in said


def test_ctrl_c_during_imports_is_one_line():
    """The package cannot handle an interrupt during Python's own start, some hundredths of a second."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from adalomo_jax.cli import main; print(flush=True); main(['finetune'])"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "adalomo-jax: interrupted\n")


def test_output_that_nobody_reads(tmp_path):
    code = "from adalomo_jax.cli import main; main(['finetune', '--help'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pipesize=4096
    )
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait(60) == 141 and said == "adalomo-jax: nobody reads the output any more\n", said
