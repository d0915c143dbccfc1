"""A run spread over devices and processes has the loss curve of one device."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

from adalomo_jax.cli import main
from adalomo_jax.run_files import RUN_FILES
from adalomo_jax.training.output_folder import claimed

STEPS = 20
"""Enough steps to stop a run on its way."""
OPTIONS = ["--steps", str(STEPS), "--evaluate-every", str(STEPS // 2), "--learning-rate", "1e-2", "--warmup-steps", "0"]
OPTIONS += ["--batch-size", "8", "--microbatches", "2", "--seq-len", "32", "--evaluate-first"]
MESH = ["--mesh", "fsdp=4,tensor=2"]


pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"line {i} of a text that goes on\n" for i in range(400)))
    return path


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row.get("loss", row.get("eval_loss")) for row in rows]


@pytest.fixture(scope="module")
def of_one_device(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    main(["finetune", "--data", str(corpus), "--output", str(folder), *OPTIONS])
    return folder


@pytest.fixture(scope="module")
def on_one_device(of_one_device):
    return losses(of_one_device)


@pytest.mark.slow
def test_a_mesh_of_eight_devices_and_from_there_to_one(corpus, tmp_path, on_one_device, capsys):
    command = ["finetune", "--data", str(corpus), "--output", str(tmp_path / "run"), *OPTIONS]
    main([*command, *MESH])
    assert len(on_one_device) == STEPS + 3 and np.ptp(on_one_device) > 0.03
    np.testing.assert_allclose(losses(tmp_path / "run"), on_one_device, rtol=1e-5)
    assert "fsdp=4,tensor=2: bytes a device" in capsys.readouterr().out
    main([*command, "--resume", "--resume-step", str(STEPS // 2)])
    np.testing.assert_allclose(losses(tmp_path / "run"), on_one_device, rtol=1e-5)
    assert f"continuing after step {STEPS // 2}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_of_one_device_goes_on_upon_a_mesh(corpus, tmp_path, of_one_device, on_one_device):
    shutil.copytree(of_one_device, tmp_path / "run")
    resuming = ["--output", str(tmp_path / "run"), "--resume", "--resume-step", str(STEPS // 2)]
    main(["finetune", "--data", str(corpus), *resuming, *OPTIONS, *MESH])
    np.testing.assert_allclose(losses(tmp_path / "run"), on_one_device, rtol=1e-5)


def launch(processes, corpus, folder, *options, of_last=()):
    """Start the command in several processes; the last one also gets ``of_last``."""
    command = [sys.executable, tiny.__file__, "finetune", "--data", str(corpus), "--output", str(folder)]
    command += [*OPTIONS, *MESH, "--coordinator", f"localhost:{free_port()}", "--processes", str(processes), *options]
    flags = re.sub(r"(device_count)=\d+", rf"\1={8 // processes}", os.environ["XLA_FLAGS"])
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    # Only the first process caches what it compiles: resumed, it would run another executable than the others.
    environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    return [
        subprocess.Popen(
            [*command, "--process", str(i), *(of_last if i == processes - 1 else ())],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def end_together(running, folder, on_one_device):
    """Check that the processes leave one run, and return their output."""
    printed = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * len(running), printed[0][1][-3000:]
    np.testing.assert_allclose(losses(folder), on_one_device, rtol=1e-5)
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("events."))
    assert names == sorted(RUN_FILES)
    assert ["written to" in out for out, _ in printed] == [True] + [False] * (len(running) - 1)
    return printed


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_train_together(processes, corpus, tmp_path, on_one_device):
    """Two of them also do so in the next test. The test is slow, since each process compiles the step for itself."""
    end_together(launch(processes, corpus, tmp_path / "run"), tmp_path / "run", on_one_device)


@pytest.mark.slow
def test_one_of_two_processes_is_stopped_and_both_go_on(corpus, tmp_path, on_one_device):
    folder, no_other_save = tmp_path / "run", ["--checkpoint-every", str(2 * STEPS)]
    running = launch(2, corpus, folder, *no_other_save)
    metrics, give_up = folder / "metrics.jsonl", time.monotonic() + 200
    while time.monotonic() < give_up and not (metrics.exists() and '"step": 2,' in metrics.read_text()):
        time.sleep(0.01)
    running[1].send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [143, 143], printed[0][1][-3000:]
    (said,) = {
        *re.findall(r"^adalomo-jax: stopped after step (\d+), which is saved", printed[0][1] + printed[1][1], re.M)
    }
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [said] and int(said) < STEPS
    assert not (folder / "model.safetensors").exists()

    printed = end_together(launch(2, corpus, folder, *no_other_save, "--resume"), folder, on_one_device)
    assert f"continuing after step {said}" in printed[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("differs", "says"),
    [
        (["--seed", "5"], "process 1 has other options than process 0"),
        (["--data", __file__], "process 1 has other text of --data than process 0"),
        (["--data", "/nowhere"], "process 1 has stopped before training, and says why"),
    ],
)
def test_processes_that_were_given_other_things_stop_before_training(differs, says, corpus, tmp_path):
    running = launch(2, corpus, tmp_path / "run", of_last=differs)
    printed = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [2, 2], printed
    lines = [[line for line in text.splitlines() if line.startswith("adalomo-jax: ")] for text in printed]
    assert [len(of_process) for of_process in lines] == [1, 1] and says in lines[0][0]
    assert says in lines[1][0] or "/nowhere: no such file" in lines[1][0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_all_processes_stop_where_another_run_has_the_folder(corpus, tmp_path):
    with claimed(tmp_path / "run"):
        running = launch(2, corpus, tmp_path / "run")
        printed = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [2, 2], printed
    assert "another run is writing there" in printed[0] and "process 0 has stopped before training" in printed[1]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--mesh fsdp=2", "--mesh fsdp=2: The mesh fsdp 2 takes 2 devices, but there are 8"),
        ("--mesh model=8", "--mesh takes each of data, fsdp, tensor once, as axis=size .*, got 'model=8'"),
        ("--mesh fsdp=8 --batch-size 12", "--batch-size 12 must be a multiple of 8"),
        ("--mesh fsdp=8 --microbatches 2", "--batch-size 8 must be a multiple of 16: data and fsdp"),
        ("--coordinator localhost:1 --mesh fsdp=8", "needs --processes and --process too"),
        ("--processes 2 --process 0", "need --coordinator: give it too"),
        (
            "--coordinator localhost:1 --processes 2 --process 2 --mesh fsdp=8",
            "--process must be from 0 .*, got 2 of 2",
        ),
        ("--coordinator localhost:1 --processes 2 --process 0", "say how with --mesh"),
        (
            "--mesh fsdp=8 --seq-len 256",
            "fewer than one for each of the 8 devices that --mesh spreads a batch over",
        ),
    ],
)
def test_what_cannot_be_spread_is_refused_in_one_line(options, says, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", "--data", str(corpus), *options.split()])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.err.count("\n") == 1
    assert re.search(says, captured.err), captured.err
    assert list(tmp_path.iterdir()) == []
