"""A run that is killed again and again ends with the same bytes as a run that was not."""

import json
import multiprocessing
import random
import time

import one_program
import pytest
from tiers import slow

OPTIONS = ["--batch-size=2", "--seq-len=16", "--evaluate-every=10", "--checkpoint-every=1"]


@pytest.fixture
def launch(tmp_path):
    """Starts the command in a process that has finished all imports, which take longer than the run."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text that goes on\n" for i in range(200)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adalomo_jax.commands.finetune", "one_program"])

    def launched(folder, *options):
        args = ["finetune", "--data", str(tmp_path / "text.txt"), *OPTIONS, "--output", str(folder), *options]
        process = context.Process(target=one_program.start_undrawn, args=(args, tmp_path / "log"))
        process.start()
        return process

    return launched


def writing(folder):
    """Whether a checkpoint is being written."""
    return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def steps_in(folder):
    return {int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()}


def rows(folder):
    """The rows of a run, without the values that depend on time."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in found]


STARTS, WRITES, TRAINS = range(3)
"""What a run is doing when a kill hits it."""


@pytest.mark.parametrize(
    ("hit", "steps"),
    [slow([WRITES], 8), slow([STARTS, WRITES, TRAINS], 20), slow(([STARTS, WRITES, TRAINS] * 7)[:20], 50)],
    ids=["1", "3", "20"],
)
def test_killed_at_random_moments(hit, steps, tmp_path, launch):
    whole, folder, chance = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    of_steps = f"--steps={steps}"
    launch(whole, of_steps).join()
    assert (whole / "model.safetensors").exists(), (tmp_path / "log").read_text()
    while_writing, reached = 0, []
    for kill in hit:
        before, give_up = steps_in(folder), time.monotonic() + 300
        process = launch(folder, of_steps, "--resume")
        if kill == STARTS:  # the run reads or compiles
            time.sleep(chance.uniform(0, 2))
        else:
            while time.monotonic() < give_up:
                assert process.exitcode is None, (tmp_path / "log").read_text()
                if steps_in(folder) - before and (kill == TRAINS or writing(folder)):
                    break
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.01 if kill == WRITES else 0.3))
        process.kill()
        process.join()
        # A run that has saved has removed the files that an earlier run left half written.
        while_writing += bool(steps_in(folder) - before) and writing(folder)
        reached.append(max(steps_in(folder), default=0))
        assert not (folder / "model.safetensors").exists(), "the run is too short for so many kills"
    launch(folder, of_steps, "--resume").join()
    many = len(hit) // 20
    assert while_writing >= 3 * many and len(set(reached)) >= min(len(hit), 2 + 3 * many), (while_writing, reached)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert rows(folder) == rows(whole)
