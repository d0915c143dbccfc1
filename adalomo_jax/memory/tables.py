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
"""The parts of a bar."""


class UsageRow(NamedTuple):
    """A step and the memory that it needs."""

    name: str
    """The step's name, as the table shows it."""
    optimizer: str
    fused: bool
    target: str
    """The target's name."""
    usage: Usage


def usage_table(rows: Sequence[UsageRow], title: str) -> Table:
    """A column for each row, so that a terminal 80 characters wide has room for five."""
    table = Table(title=title)
    table.add_column("a chip", min_width=max(len(word) for name in _PARTS for word in name.split()))
    for row in rows:
        table.add_column(row.name, justify="right")
    usages = [row.usage for row in rows]
    for name, attribute in _PARTS.items():
        table.add_row(name, *(format_bytes(getattr(usage, attribute)) for usage in usages))
    table.add_section()
    table.add_row("total", *(format_bytes(usage.peak_bytes) for usage in usages), style="bold")
    table.add_row("the chip's limit", *(format_bytes(usage.limit_bytes) for usage in usages))
    table.add_row("fits", *map(verdict, usages), style="bold")
    _add_unless_zero(table, "to spare", [max(0, usage.spare_bytes) for usage in usages])
    _add_unless_zero(table, "over the limit", [max(0, -usage.spare_bytes) for usage in usages])
    table.add_section()
    _add_unless_zero(table, "in the host's memory", [usage.host_bytes for usage in usages])
    kinds = sorted({kind for usage in usages for kind in usage.collectives})
    if kinds:
        table.add_section()
        table.caption = "The last rows count operations between chips, each once, however often its loop runs."
    for kind in kinds:
        table.add_row(kind, *(_collectives(usage, kind) for usage in usages))
    return table


def _add_unless_zero(table: Table, name: str, sizes: Sequence[int]) -> None:
    """A row of sizes; none if all are 0, which would say nothing."""
    if any(sizes):
        table.add_row(name, *map(format_bytes, sizes))


def _collectives(usage: Usage, kind: str) -> str:
    found = usage.collectives.get(kind)
    return "none" if found is None else f"{found.count}: {format_bytes(found.bytes)}"


def verdict(usage: Usage) -> str:
    """Whether the step fits, or the compiler refused it. A lower bound can only rule it out."""
    if usage.fits:
        return "perhaps" if usage.estimated else "yes"
    return "refused" if usage.refused else "no"


def json_line(row: UsageRow) -> str:
    """A row as one JSON object. Figures that the compiler of a refused step did not report are null."""
    usage = row.usage
    found: dict[str, Any] = {"name": row.name, "optimizer": row.optimizer, "fused": row.fused, "target": row.target}
    for name in ("params_bytes", "state_bytes", "argument_bytes", "alias_bytes", "temp_bytes", "peak_bytes"):
        found[name] = getattr(usage, name)
    for name in ("host_bytes", "limit_bytes", "fits", "compile_seconds", "estimated"):
        found[name] = getattr(usage, name)
    if usage.collectives:
        found["collectives"] = {kind: of_kind._asdict() for kind, of_kind in usage.collectives.items()}
    return json.dumps(found)


def plot_usage(path: Path, rows: Sequence[UsageRow], title: str) -> None:
    """Write a PNG with a bar for each row, stacked from the parts of its memory, and a line at the chip's limit."""
    figure = Figure(figsize=(8, 1.6 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(rows))
    names = [row.name for row in rows]
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
