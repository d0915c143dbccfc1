"""The command ``plot``: runs in one picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from adalomo_jax.inputs import InputError
from adalomo_jax.run_files import METRICS
from adalomo_jax.training.output_folder import check_picture

if TYPE_CHECKING:
    from adalomo_jax.training.metrics import Row


@dataclasses.dataclass(frozen=True)
class PlotConfig:
    """Compare runs of finetune in one picture: losses, learning rate and norm of the gradient by step."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]", help_behavior_hint="")]
    """The runs' output folders. A run need not be finished."""
    output: Path = Path("runs.png")
    """The picture to draw, a PNG. It replaces an existing one."""


def compare(config: PlotConfig) -> Path:
    """Draw the picture and say where it is.

    Raises:
        InputError: no runs, a folder without a run, a run without rows, or a picture that cannot be written.
    """
    if not config.runs:
        raise InputError("plot must be followed by the output folders of runs")
    check_picture(config.output)
    runs = {name: _read(folder) for name, folder in zip(run_names(config.runs), config.runs)}
    from adalomo_jax.training.plots import plot_runs

    plot_runs(config.output, runs)
    print(f"drawn to {config.output}")
    return config.output


def run_names(folders: Sequence[Path]) -> list[str]:
    """The names of folders, with as many of their parents as are needed to tell them all apart.

    >>> run_names([Path("runs/adalomo"), Path("runs/adamw")])
    ['adalomo', 'adamw']
    >>> run_names([Path("one/run"), Path("two/run")])
    ['one/run', 'two/run']

    Raises:
        InputError: a folder is named twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    twice = [folder for i, folder in enumerate(folders) if parts[i] in parts[:i]]
    if twice:
        raise InputError(f"{twice[0]} is named twice")
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(map(str, folders))


def _read(folder: Path) -> list[Row]:
    from adalomo_jax.training.metrics import read_rows

    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give the output folders of runs")
    if not (folder / METRICS).is_file():
        raise InputError(f"{folder} holds no run: it has no {METRICS}")
    try:
        rows = read_rows(folder / METRICS)
    except ValueError as error:
        raise InputError(str(error)) from None
    if not rows:
        raise InputError(f"{folder} has no rows in its {METRICS} yet")
    return rows
