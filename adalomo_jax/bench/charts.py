"""Pictures of the measurements."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from adalomo_jax.bench.contestants import REFERENCE
from adalomo_jax.bench.measure import Measured
from adalomo_jax.bench.tables import Result, title_of
from adalomo_jax.pretrained.files import write_whole


def plot_times(path: Path, results: Sequence[Result]) -> None:
    """Write a PNG with a panel for each case: a step's median time by contestant, and the middle half of its times."""
    most = max(len(result.found) for result in results)
    figure = Figure(figsize=(8, len(results) * (1.3 + 0.3 * most)), layout="constrained")
    for axes, result in zip(figure.subplots(len(results), 1, squeeze=False).flat, results):
        measured = [one for one in result.found if not one.error]
        medians = [statistics.median(one.seconds) for one in measured]
        colours = ["tab:red" if one.name == REFERENCE else "tab:gray" for one in measured]
        if not measured:
            continue
        axes.barh(range(len(measured)), medians, color=colours, xerr=_spread(measured), ecolor="black", capsize=2)
        axes.set_yticks(range(len(measured)), [one.name for one in measured])
        for one, median in zip(measured, medians):
            if one.name == REFERENCE:
                axes.axvline(median, color="tab:red", linewidth=0.8, linestyle="--")
        axes.invert_yaxis()
        axes.set(title=title_of(result.case), xlabel="seconds a step")
    _write(path, figure)


def plot_depths(path: Path, results: Sequence[Result], title: str) -> None:
    """Write a PNG of results that differ only in depth: time and memory against layers, a line for each contestant."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title)
    times, memory = figure.subplots(1, 2)
    for name in [one.name for one in results[0].found]:
        points = [(r.case.layers, one) for r in results for one in r.found if one.name == name and not one.error]
        layers = [depth for depth, _ in points]
        times.plot(layers, [statistics.median(one.seconds) for _, one in points], marker="o", markersize=4, label=name)
        memory.plot(layers, [(one.peak_bytes or 0) / 1e9 for _, one in points], marker="o", markersize=4)
    for axes, label in ((times, "seconds a step"), (memory, "peak memory of the process, GB")):
        axes.set(xlabel="layers", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(*times.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    _write(path, figure)


def _spread(measured: Sequence[Measured]) -> list[list[float]]:
    quartiles = [statistics.quantiles(one.seconds, n=4, method="inclusive") for one in measured]
    return [[middle - low for low, middle, _ in quartiles], [high - middle for _, middle, high in quartiles]]


def _write(path: Path, figure: Figure) -> None:
    write_whole(path, lambda partial: FigureCanvasAgg(figure).print_png(partial))
