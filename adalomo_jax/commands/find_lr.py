"""The learning-rate range test: a short run in which the rate rises exponentially, and what its losses suggest.

Source: Smith (2015), arXiv:1506.01186; smoothing and the stop follow fastai's ``lr_find``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from adalomo_jax.inputs import InputError
from adalomo_jax.pretrained.by_name import Pretrained
from adalomo_jax.pretrained.files import write_whole
from adalomo_jax.text.data import Data
from adalomo_jax.training.config import FinetuneConfig
from adalomo_jax.training.loop import train
from adalomo_jax.training.metrics import Row, StepRow, to_json
from adalomo_jax.training.plots import plot_range
from adalomo_jax.training.program import build_program
from adalomo_jax.training.schedule import make_range_schedule
from adalomo_jax.training.summary import progress_bar, warned_of

STEPS = 100
"""Steps of the test, 20 for each power of ten."""
BELOW, ABOVE = 1e-3, 1e2
"""Its first and last rate, as multiples of the optimizer's own."""
SMOOTHING = 0.8
"""Share that the smoothed loss keeps at each step: it lags by four steps, a fifth of a power of ten."""
DIVERGED = 4.0
"""The test stops when the smoothed loss is this many times the best."""
WINDOW = 15
"""Steps over which a slope is taken."""
KNOWN = (
    "the test suggested 1.2 (adalomo) and 0.8 (adamw) times the known best rate of the tiny model, a third of "
    "SmolLM2's, and a twentieth for lomo"
)
"""How far off the suggestion was."""
FILES = ("lr.jsonl", "lr.png")
"""The files that the test leaves."""


class Rate(NamedTuple):
    """A step of the test; losses are in nats a token."""

    step: int
    learning_rate: float
    loss: float
    smoothed: float


class Suggestion(NamedTuple):
    """What the losses suggest."""

    steepest: float
    """The rate at which the loss falls fastest, on the way to its least."""
    tenth: float
    """A tenth of the rate at which it is least."""

    @property
    def rate(self) -> float:
        """The greater of the two. Both are below rates that are too high. The slope alone at times shows noise."""
        return max(self)


class _Diverged(Exception):
    """Ends the run of the test early."""


def find_lr(
    config: FinetuneConfig,
    model: Pretrained,
    data: Data,
    mesh: Mesh | None,
    folder: Path,
    console: Console,
    *,
    writes: bool = True,
) -> Path:
    """Run the test with the options' model, data and optimizer; print, draw and write what it finds into the folder.

    If there are several processes, all take part, and one writes.

    Raises:
        InputError: the folder holds a test already, or the loss fell at no rate.
    """
    if any((folder / name).exists() for name in FILES):
        raise InputError(f"--output {folder} holds a range test already ({', '.join(FILES)}); name another folder")
    rates = range_test(config, model, data, mesh, console)
    suggestion = suggest(rates)
    if writes:
        _write(folder, rates, suggestion, f"{model.name}, {config.optimizer}")
    console.print(_table(rates))
    console.print(_advice(suggestion), highlight=False, soft_wrap=True)
    console.print(f"written to {folder}", highlight=False, soft_wrap=True)
    return folder


def range_test(
    config: FinetuneConfig, model: Pretrained, data: Data, mesh: Mesh | None, console: Console
) -> list[Rate]:
    """The steps of the test, until the last rate or until the loss diverges."""
    config = dataclasses.replace(config, steps=STEPS, evaluate_every=STEPS)
    schedule = make_range_schedule(config, BELOW, ABOVE, STEPS)
    program = build_program(config, model, mesh, schedule=schedule)
    found: list[StepRow] = []
    with progress_bar(console, STEPS) as show:

        def on_row(row: Row) -> None:
            if not isinstance(row, StepRow):
                return
            show(row)
            found.append(row)
            smoothed = smooth([row.loss for row in found])
            if not math.isfinite(row.loss) or smoothed[-1] > DIVERGED * min(smoothed):
                raise _Diverged

        try:
            train(program, config, data, on_row)
        except _Diverged:
            pass
    smoothed = smooth([row.loss for row in found])
    return [Rate(row.step, row.learning_rate, row.loss, value) for row, value in zip(found, smoothed)]


def smooth(losses: Sequence[float]) -> list[float]:
    """The exponential moving average without the bias towards 0, as in Adam.

    >>> [round(loss, 3) for loss in smooth([3.0, 3.0, 4.0])]
    [3.0, 3.0, 3.41]
    """
    average, found = 0.0, []
    for step, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        found.append(average / (1 - SMOOTHING**step))
    return found


def suggest(rates: Sequence[Rate]) -> Suggestion:
    """The rate at which the loss falls fastest, by straight lines through windows of steps, and a tenth of the best.

    Steps after the least loss do not count: a loss that has jumped falls faster than any other.

    Raises:
        InputError: the loss was least in the first steps: it fell at no rate.
    """
    least = int(np.argmin([rate.smoothed if math.isfinite(rate.smoothed) else math.inf for rate in rates]))
    losses = np.array([rate.loss for rate in rates[: least + 1]])
    if len(losses) < WINDOW or not math.isfinite(losses[0]):
        raise InputError(
            f"--find-lr: the loss was least at step {least + 1} of {len(rates)}, at the smallest learning rates; it "
            "must fall to show one: is the model broken, or its data known to it already?"
        )
    windows = np.lib.stride_tricks.sliding_window_view(losses, WINDOW)
    steps = np.arange(WINDOW) - (WINDOW - 1) / 2
    steepest = int(np.argmin(windows @ steps)) + WINDOW // 2
    return Suggestion(rates[steepest].learning_rate, rates[least].learning_rate / 10)


def _advice(suggestion: Suggestion) -> str:
    return (
        f"the loss falls fastest at {suggestion.steepest:.1e}, and is least at {10 * suggestion.tenth:.1e}, just "
        f"before it rises; a tenth of that is {suggestion.tenth:.1e}\n"
        f"the test suggests the greater of the two: --learning-rate {suggestion.rate:.1e}\n"
        f"try larger ones, too: {KNOWN}"
    )


def _table(rates: Sequence[Rate]) -> Table:
    """Every tenth step and the last."""
    table = Table(title="learning-rate range test")
    for name in ("step", "learning rate", "loss", "smoothed"):
        table.add_column(name, justify="right")
    for rate in rates:
        if rate.step % 10 == 0 or rate is rates[-1]:
            table.add_row(str(rate.step), f"{rate.learning_rate:.2e}", f"{rate.loss:.3f}", f"{rate.smoothed:.3f}")
    return table


def _write(folder: Path, rates: Sequence[Rate], suggestion: Suggestion, title: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(to_json(rate) + "\n" for rate in rates)
    write_whole(folder / FILES[0], lambda partial: partial.write_text(lines, encoding="utf-8"))
    curves = {"training batch": [rate.loss for rate in rates], "smoothed": [rate.smoothed for rate in rates]}
    with warned_of(f"{FILES[1]} could not be drawn"):
        plot_range(folder / FILES[1], [rate.learning_rate for rate in rates], curves, suggestion.rate, title)
