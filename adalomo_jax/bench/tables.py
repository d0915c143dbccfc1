"""The measurements as tables, as JSON and as a line through depths."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from adalomo_jax.bench.contestants import Case
from adalomo_jax.bench.measure import Measured, ratios_to_reference
from adalomo_jax.memory.usage import format_bytes


class Result(NamedTuple):
    """The measurements of a case."""

    case: Case
    found: list[Measured]


class Line(NamedTuple):
    """Seconds of a step as a line through depths: ``seconds = fixed + per_layer * layers``."""

    fixed: float
    per_layer: float
    largest_residual: float
    """The largest residual of a time, relative to the line."""
    compile_ratio: float | None
    """The longest compilation over the shortest."""


def title_of(case: Case) -> str:
    return f"{case.model}, {case.layers} layers, {case.batch_size} x {case.seq_len}, {case.dtype}"


def time_table(result: Result) -> Table:
    """A row for each contestant: how long its steps take."""
    caption = f"medians of {max(len(one.seconds) for one in result.found)} rounds; the middle half is in brackets"
    table = _table(title_of(result.case), ["step", "seconds", "tokens/s", "adalomo, fused over it"])
    table.caption = caption
    ratios = ratios_to_reference(result.found)
    tokens = result.case.batch_size * result.case.seq_len
    for one in result.found:
        if one.error:
            table.add_row(one.name, "failed")
            continue
        seconds, ratio = statistics.median(one.seconds), ratios.get(one.name)
        over = "" if ratio is None else f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
        table.add_row(one.name, f"{seconds:.3f}", f"{tokens / seconds:.1f}", over)
    return table


def memory_table(result: Result) -> Table:
    """A row for each contestant: its time to compile, and its memory."""
    table = _table(title_of(result.case), ["step", "compile time", "peak of the process", "by the compiler"])
    for one in result.found:
        if not one.error:
            compiling = "" if one.compile_seconds is None else f"{one.compile_seconds:.1f} s"
            by_compiler = "" if one.memory is None else format_bytes(one.memory["peak"])
            table.add_row(one.name, compiling, format_bytes(one.peak_bytes), by_compiler)
    return table


def line_through(results: Sequence[Result], name: str) -> Line | None:
    """A contestant's line through results that differ only in depth; None for fewer than three.

    The line has the least squares of relative residuals, because the times differ by the factor of the depths.
    """
    found = [(r.case.layers, one) for r in results for one in r.found if one.name == name and not one.error]
    if len(found) < 3:
        return None
    layers = np.array([depth for depth, _ in found], float)
    seconds = np.array([statistics.median(one.seconds) for _, one in found])
    columns = np.stack([np.ones_like(layers), layers], axis=1) / seconds[:, None]
    fixed, per_layer = np.linalg.lstsq(columns, np.ones_like(layers))[0]
    residuals = np.abs(seconds / (fixed + per_layer * layers) - 1)
    compiled = [one.compile_seconds for _, one in found if one.compile_seconds is not None]
    longest = max(compiled) / min(compiled) if compiled else None
    return Line(float(fixed), float(per_layer), float(residuals.max()), longest)


def depth_table(results: Sequence[Result], names: Sequence[str], title: str) -> Table:
    """How each contestant's time and compilation change as layers are added."""
    table = _table(title, ["step", "ms a layer", "off a line at most", "longest compilation / shortest"])
    for name in names:
        line = line_through(results, name)
        if line is not None:
            ratio = "" if line.compile_ratio is None else f"{line.compile_ratio:.2f}"
            table.add_row(name, f"{1e3 * line.per_layer:.2f}", f"{line.largest_residual:.1%}", ratio)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    """A table with a column of names and some of figures, for a terminal 80 characters wide."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=not i)
    return table


def to_json(results: Sequence[Result], lines: Mapping[str, Mapping[str, Line]]) -> str:
    """All results, with the seconds of each round, so that other ratios can be computed.

    Args:
      results: the results of the cases.
      lines: by what several cases share, and by contestant.
    """
    found = {
        "machine": machine(),
        "cases": [_case_json(result) for result in results],
        "depth": {title: {name: line._asdict() for name, line in of.items()} for title, of in lines.items()},
    }
    return json.dumps(found, indent=1) + "\n"


def machine() -> dict[str, Any]:
    """The machine and the versions behind the figures."""
    names = ("adalomo-jax", "jax", "jaxlib", "optax", "flax", "numpy", "torch", "transformers", "lomo-optim")
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version for name in names if (version := _version(name))},
    }


def _case_json(result: Result) -> dict[str, Any]:
    ratios = ratios_to_reference(result.found)
    tokens = result.case.batch_size * result.case.seq_len
    rows = []
    for one in result.found:
        row = one._asdict()
        if not one.error:
            median = statistics.median(one.seconds)
            row |= {"median_seconds": median, "tokens_per_second": tokens / median}
        if one.name in ratios:
            row["adalomo_fused_over_it"] = ratios[one.name]._asdict()
        rows.append(row)
    return result.case._asdict() | {"rows": rows}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
