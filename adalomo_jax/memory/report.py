"""Usages as a table, a picture and lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from adalomo_jax.memory.usage import Usage, format_bytes

_PARTS = {
    "parameters": "params_bytes",
    "state": "state_bytes",
    "gradients alive": "gradient_bytes",
    "saved layer inputs": "saved_bytes",
    "other temporaries": "other_bytes",
}
"""What a bar is stacked of."""


class Row(NamedTuple):
    """A step and what it needs."""

    name: str
    """Of the step, as the table shows it."""
    optimizer: str
    fused: bool
    target: str
    """Its name."""
    usage: Usage


def usage_table(rows: Sequence[Row], title: str) -> Table:
    """A line for each row, in gigabytes."""
    table = Table(title=title)
    table.add_column("step", style="bold")
    for name in (*_PARTS, "host", "total a chip", "its limit"):
        table.add_column(name, justify="right")
    table.add_column("fits")
    for row in rows:
        usage = row.usage
        parts = [format_bytes(getattr(usage, part)) for part in _PARTS.values()]
        totals = [format_bytes(n) for n in (usage.host_bytes, usage.peak_bytes, usage.limit_bytes)]
        table.add_row(label(row), *parts, *totals, verdict(usage))
    return table


def label(row: Row) -> str:
    """The name, and whether what it needs is an estimate."""
    return f"{row.name} (estimate)" if row.usage.estimated else row.name


def verdict(usage: Usage) -> str:
    """Whether it fits, and by how much; whether the compiler refused it."""
    if usage.fits:
        return f"yes, {format_bytes(usage.spare_bytes)} to spare"
    by_compiler = ", and refused" if usage.refused else ""
    return f"no, {format_bytes(-usage.spare_bytes)} too much{by_compiler}"


def json_line(row: Row) -> str:
    """One object. Figures that the compiler of a refused step did not say are null."""
    usage = row.usage
    found: dict[str, Any] = {"name": row.name, "optimizer": row.optimizer, "fused": row.fused, "target": row.target}
    for name in ("params_bytes", "state_bytes", "argument_bytes", "alias_bytes", "temp_bytes", "peak_bytes"):
        found[name] = getattr(usage, name)
    for name in ("host_bytes", "limit_bytes", "fits", "compile_seconds", "estimated"):
        found[name] = getattr(usage, name)
    return json.dumps(found)


def plot_usage(path: Path, rows: Sequence[Row], title: str) -> None:
    """Write a PNG with a bar for each row, stacked of what it needs, and a line at the chip's limit."""
    figure = Figure(figsize=(8, 1.6 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(rows))
    names = [label(row) for row in rows]
    for part, attribute in _PARTS.items():
        sizes = np.array([getattr(row.usage, attribute) for row in rows]) / 10**9
        axes.barh(range(len(rows)), sizes, left=left, label=part)
        left += sizes
    for limit in {row.usage.limit_bytes for row in rows}:
        axes.axvline(limit / 10**9, color="black", linestyle="--", label=f"limit, {format_bytes(limit)}")
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="GB a chip")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    FigureCanvasAgg(figure).print_png(str(path))
