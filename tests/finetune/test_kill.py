"""A run that is killed again and again leaves, at its end, the bytes of one that was not."""

import json
import multiprocessing
import random
import time

import pytest
import tiny

OPTIONS = ["--batch-size=2", "--seq-len=16", "--evaluate-every=10", "--checkpoint-every=1"]


@pytest.fixture
def launch(tmp_path):
    """Starts the command in a process that has all imports done: they take longer than the run."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text that goes on\n" for i in range(200)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adalomo_jax.finetune.run", "tiny"])

    def launched(folder, *options):
        args = ["finetune", "--data", str(tmp_path / "text.txt"), *OPTIONS, "--output", str(folder), *options]
        process = context.Process(target=tiny.start, args=(args, tmp_path / "log"))
        process.start()
        return process

    return launched


def writing(folder):
    """Whether a checkpoint is being written."""
    return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def steps_in(folder):
    return {int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()}


def rows(folder):
    """Without what depends on time."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in found]


@pytest.mark.parametrize(("kills", "steps"), [(3, 20), pytest.param(20, 50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills, steps, tmp_path, launch):
    """Each third kill hits a run that starts, one that writes a checkpoint, and one that trains."""
    whole, folder, chance = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    of_steps = f"--steps={steps}"
    launch(whole, of_steps).join()
    assert (whole / "model.safetensors").exists(), (tmp_path / "log").read_text()
    while_writing, reached = 0, []
    for kill in range(kills):
        before, give_up = steps_in(folder), time.monotonic() + 300
        process = launch(folder, of_steps, "--resume")
        if kill % 3 == 0:  # while it starts, reads, compiles
            time.sleep(chance.uniform(0, 2))
        else:  # while it trains, and each other time in the middle of writing
            while time.monotonic() < give_up:
                assert process.exitcode is None, (tmp_path / "log").read_text()
                if steps_in(folder) - before and (kill % 3 == 2 or writing(folder)):
                    break
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.01 if kill % 3 == 1 else 0.3))
        process.kill()
        process.join()
        # A run that has saved has removed what an earlier one left half written.
        while_writing += bool(steps_in(folder) - before) and writing(folder)
        reached.append(max(steps_in(folder), default=0))
        assert not (folder / "model.safetensors").exists(), "the run is too short for so many kills"
    launch(folder, of_steps, "--resume").join()
    assert while_writing >= 3 * (kills // 20) and len(set(reached)) >= 2 + 3 * (kills // 20), (while_writing, reached)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert rows(folder) == rows(whole)
