"""Runs as pictures."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from adalomo_jax.pretrained.files import write_whole
from adalomo_jax.training.metrics import EvaluationRow, Row, StepRow, layer_medians

_MOST = 1e100
"""Larger values are not drawn, like values that are not finite: axes reach beyond it."""


def plot_losses(path: Path, rows: Sequence[Row], title: str) -> None:
    """Write a PNG of the training and evaluation loss by step."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = _axes_of(figure.subplots(), "loss (nats a token)")
    _draw_losses(axes, rows)
    axes.set_title(title, parse_math=False)
    _write(path, figure)


def plot_run(path: Path, rows: Sequence[Row], title: str) -> None:
    """Write a PNG of what a run did, step by step: loss, learning rate, gradient norm and updates by layer."""
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    losses, rate, norm, updates = figure.subplots(2, 2).flat
    _draw_losses(_axes_of(losses, "loss (nats a token)"), rows)
    for axes, name, label in ((rate, "learning_rate", "learning rate"), (norm, "grad_norm", "norm of the gradient")):
        _axes_of(axes, label).plot(*_series(rows, StepRow, name), linewidth=1, color="tab:blue")
    _set_log(norm)
    _draw_updates(_axes_of(updates, "update, RMS of a layer's matrices"), rows)
    _write(path, figure)


def plot_runs(path: Path, runs: Mapping[str, Sequence[Row]]) -> None:
    """Write a PNG that compares runs, by their names: losses, learning rate and gradient norm by step.

    Args:
        path: the picture's path.
        runs: the rows of each run. A run has one colour in all panels.
    """
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    panels = {
        "eval_loss": "evaluation loss (nats a token)",
        "loss": "training loss (nats a token)",
        "learning_rate": "learning rate",
        "grad_norm": "norm of the gradient",
    }
    for axes, (name, label) in zip(figure.subplots(2, 2).flat, panels.items()):
        _axes_of(axes, label)
        kind, marker = (EvaluationRow, "o") if name == "eval_loss" else (StepRow, None)
        for run, rows in runs.items():
            axes.plot(*_series(rows, kind, name), linewidth=1, marker=marker, markersize=4, label=_label(run))
        if name in ("grad_norm", "learning_rate"):
            _set_log(axes)
    legend = figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _write(path, figure)


def plot_range(
    path: Path, rates: Sequence[float], curves: Mapping[str, Sequence[float]], suggested: float, title: str
) -> None:
    """Write a PNG of losses by learning rate, with a line at the suggested one."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = _axes_of(figure.subplots(), "loss (nats a token)", "learning rate")
    for (name, losses), style in zip(curves.items(), ({"alpha": 0.4, "color": "tab:gray"}, {"color": "tab:red"})):
        axes.plot(rates, losses, linewidth=1, label=name, **style)
    axes.axvline(suggested, color="black", linestyle="--", label=f"suggested: {suggested:.1e}")
    axes.set_xscale("log")
    finite = [loss for losses in curves.values() for loss in losses if np.isfinite(loss)]
    axes.set_ylim(min(finite) * 0.95, 1.5 * finite[0])  # a loss that diverges would press all others flat
    axes.set_title(title, parse_math=False)
    axes.legend()
    _write(path, figure)


def _series(rows: Iterable[Row], kind: type[Row], name: str) -> np.ndarray:
    """``[2, n]``: steps and values, without values that are not finite, which cannot be drawn."""
    found = np.array([(row.step, getattr(row, name)) for row in rows if isinstance(row, kind)], float).reshape(-1, 2)
    return found[np.abs(found[:, 1]) < _MOST].T


def _label(name: str) -> str:
    """The label of a run in a legend, which leaves out labels that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _draw_losses(axes: Any, rows: Sequence[Row]) -> None:
    axes.plot(*_series(rows, StepRow, "loss"), linewidth=1, color="tab:gray", label="training batch")
    evaluation = _series(rows, EvaluationRow, "eval_loss")
    axes.plot(*evaluation, marker="o", markersize=4, color="tab:red", label="evaluation text")
    axes.legend()


def _draw_updates(axes: Any, rows: Sequence[Row]) -> None:
    """A line for each layer, from the first, dark, to the last, bright."""
    steps = [row for row in rows if isinstance(row, StepRow) and len(layer_medians(row))]
    if not steps:
        return
    by_layer = np.array([layer_medians(row) for row in steps]).T
    last = len(by_layer) - 1
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 1, len(by_layer)))
    for layer, (values, colour) in enumerate(zip(by_layer, colours)):
        label = f"layer {layer}" if layer in (0, last // 2, last) else None
        axes.plot([row.step for row in steps], values, linewidth=1, color=colour, label=label)
    axes.legend()
    _set_log(axes)


def _set_log(axes: Any) -> None:
    """Use a logarithmic axis if any value is above 0. Steps that change nothing have 0."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [np.zeros(0)])
    if np.any(values > 0):
        axes.set_yscale("log", nonpositive="mask")


def _axes_of(axes: Any, label: str, below: str = "step") -> Any:
    axes.set(xlabel=below, ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    return axes


def _write(path: Path, figure: Figure) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for a letter of a run's name
        write_whole(path, lambda partial: FigureCanvasAgg(figure).print_png(partial))
