"""Measures steps in turn: each contestant in a process of its own, one step at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adalomo_jax.bench.contestants import REFERENCE, Case, Contestant
from adalomo_jax.models import DecoderConfig

WARM_UP = 2
"""Steps that are not counted: the first ones of a process are slower."""


class Ratio(NamedTuple):
    """The ratio of two contestants' times, step by step in the same rounds."""

    median: float
    low: float
    """A quarter of the rounds is below."""
    high: float
    """A quarter of the rounds is above."""


class Measured(NamedTuple):
    """The measurements of one contestant on one case."""

    name: str
    seconds: list[float]
    """Seconds of a step in each round."""
    params: int = 0
    """Number of weights."""
    compile_seconds: float | None = None
    memory: Mapping[str, int] | None = None
    """Bytes that the compiler reports: argument, output, alias, temp, peak."""
    peak_bytes: int | None = None
    """Most memory of the process: resident on a CPU, the device's elsewhere."""
    device: str | None = None
    """The device that it ran on. This process asks for none, as it would then hold memory, or a whole TPU."""
    error: str | None = None
    """Why it could not be measured."""


class Failed(Exception):
    """A contestant's process has ended by itself; the message says how."""


class Worker:
    """A contestant's process."""

    def __init__(self, command: Sequence[str], order: Mapping[str, Any]):
        self._log = tempfile.TemporaryFile("w+")
        # Compilation is timed, so no program may come from a cache. On a GPU, no process may take all memory.
        own = {"JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=os.environ | own
        )
        self.compiled: dict[str, Any] = self._ask(json.dumps(order))

    def step(self) -> float:
        """Takes a step and returns its seconds."""
        return self._ask("step")

    def finish(self) -> int | None:
        """Ends the process, and returns the most memory that it has had."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._answer()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the answer says why
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        if status == -signal.SIGKILL:
            raise Failed("was killed, as Linux does when memory runs out")
        self._log.seek(0)
        said = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        raise Failed(said[-1][:300] if said else f"ended with status {status}")


def start_worker(case: Case, contestant: Contestant, model: DecoderConfig) -> Worker:
    """Starts the contestant's process and compiles its step."""
    order = _order(case, model) | {"contestant": contestant._asdict()}
    return Worker([sys.executable, "-m", "adalomo_jax.bench.worker"], order)


def start_official(case: Case, model: DecoderConfig) -> Worker:
    """Starts the official PyTorch AdaLomo's process."""
    file = Path(__file__).with_name("lomo_optim_worker.py")
    return Worker([sys.executable, str(file)], _order(case, model))


def measure(starts: Mapping[str, Callable[[], Worker]], rounds: int, say: Callable[[str], None]) -> list[Measured]:
    """Starts all contestants, has each take a step in each round, in alternating order, and ends all.

    Args:
      starts: by name, the function that starts a contestant.
      rounds: how many rounds.
      say: gets a text of what is being done.
    """
    workers: dict[str, Worker] = {}
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    errors: dict[str, str] = {}

    def attempt(name: str, do: Callable[[], Any]) -> Any:
        """A contestant that fails is dropped. The others continue."""
        try:
            return do()
        except Failed as error:
            errors[name] = str(error)
            if name in workers:
                workers.pop(name).kill()

    try:
        for name, start in starts.items():
            say(f"compiling {name}")
            worker = attempt(name, start)
            if worker is not None:
                workers[name] = worker
        for i in range(-WARM_UP, rounds):
            say(f"step {i + 1} of {rounds}" if i >= 0 else "warming up")
            for name, worker in [*workers.items()][:: 1 if i % 2 else -1]:
                seconds[name].append(attempt(name, worker.step))
        peaks = {name: attempt(name, worker.finish) for name, worker in [*workers.items()]}
        compiled = {name: worker.compiled for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
    return [
        Measured(name, [], error=errors[name])
        if name in errors
        else Measured(name, seconds[name][WARM_UP:], peak_bytes=peaks[name], **compiled[name])
        for name in starts
    ]


def ratios_to_reference(found: Sequence[Measured]) -> dict[str, Ratio]:
    """By name, the time of `REFERENCE` over that of each, if both were measured.

    >>> [fused, other] = Measured(REFERENCE, [1.0, 2.0, 3.0]), Measured("other", [2.0, 2.0, 2.0])
    >>> ratios_to_reference([fused, other])["other"]
    Ratio(median=1.0, low=0.75, high=1.25)
    """
    reference = next((one.seconds for one in found if one.name == REFERENCE and not one.error), None)
    if reference is None:
        return {}
    return {one.name: _ratio(reference, one.seconds) for one in found if not one.error}


def _ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(statistics.median(ratios), low, high)


def _order(case: Case, model: DecoderConfig) -> dict[str, Any]:
    return {"sizes": dataclasses.asdict(model), "shape": [case.batch_size, case.seq_len], "dtype": case.dtype}
