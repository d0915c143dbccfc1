"""The command ``bench``: all cases that the options name, one after the other."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from adalomo_jax.bench.charts import plot_depths, plot_times
from adalomo_jax.bench.config import BenchConfig, bench_folder, check_bench_options
from adalomo_jax.bench.contestants import CONTESTANTS, OFFICIAL, Case, contestants_of
from adalomo_jax.bench.measure import Worker, measure, start_official, start_worker
from adalomo_jax.bench.tables import (
    Line,
    Result,
    depth_table,
    line_through,
    memory_table,
    time_table,
    title_of,
    to_json,
)
from adalomo_jax.commands.memory_options import model_sizes
from adalomo_jax.inputs import InputError
from adalomo_jax.models import PRESETS, DecoderConfig, to_hugging_face
from adalomo_jax.pretrained.files import write_whole


def run(config: BenchConfig, console: Console | None = None) -> list[Result]:
    """Measure, print a table for each case, and write ``bench.json`` and pictures.

    It writes the results after each case, so that a benchmark that is cut off leaves the cases before.

    Raises:
        InputError: an option cannot be used. Nothing is compiled or written then.
    """
    check_bench_options(config)
    combinations = itertools.product(config.model, config.dtype, config.seq_len, config.layers or (None,))
    cases = [_case(config, *combination) for combination in combinations]
    folder = bench_folder(config)
    console = console or Console()
    folder.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for case, model in cases:
        starts = _starts(config, case, model)
        left_out = [c.name for c in CONTESTANTS if c.microbatches and case.batch_size % c.microbatches]
        if left_out and config.only is None:
            console.print(
                f"left out, as microbatches must divide --batch-size {case.batch_size}: {', '.join(left_out)}",
                highlight=False,
            )
        with console.status(title_of(case)) as status:
            say = lambda doing, case=case: status.update(f"{title_of(case)}: {doing}")
            results.append(Result(case, measure(starts, config.rounds, say)))
        console.print(time_table(results[-1]), memory_table(results[-1]))
        for one in results[-1].found:
            if one.error:
                console.print(f"{one.name}: {one.error}", markup=False, highlight=False, soft_wrap=True)
        _write(folder, results)
    for title, of_title in _by_depth(results).items():
        console.print(depth_table(of_title, _names(of_title), title))
    console.print(f"written to {folder}", highlight=False, soft_wrap=True)
    return results


def _case(config: BenchConfig, name: str, dtype: str, seq_len: int, layers: int | None) -> tuple[Case, DecoderConfig]:
    model = model_sizes(name, PRESETS)
    if seq_len > model.max_position_embeddings:
        most = model.max_position_embeddings
        raise InputError(f"--seq-len {seq_len} is longer than the {most} positions of {name}")
    if config.against and not _is_plain_llama(model):
        raise InputError(f"--against lomo-optim takes Llamas without biases and rope scaling, which {name} has")
    model = dataclasses.replace(model, num_hidden_layers=layers or model.num_hidden_layers)
    case = Case(name, model.num_hidden_layers, config.batch_size, seq_len, dtype)
    return case, model


def _is_plain_llama(model: DecoderConfig) -> bool:
    has_more = model.qkv_bias or model.mlp_bias or model.rope_scaling
    return not has_more and to_hugging_face(model, "float32")["model_type"] == "llama"


def _starts(config: BenchConfig, case: Case, model: DecoderConfig) -> dict[str, Callable[[], Worker]]:
    starts: dict[str, Callable[[], Worker]] = {
        contestant.name: partial(start_worker, case, contestant, model)
        for contestant in contestants_of(case, config.only)
    }
    if config.against:
        starts[OFFICIAL] = partial(start_official, case, model)
    return starts


def _by_depth(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results that differ only in depth, with at least three depths, by what they share."""
    found: dict[str, list[Result]] = {}
    for result in results:
        case = result.case
        found.setdefault(f"{case.model}, {case.batch_size} x {case.seq_len}, {case.dtype}", []).append(result)
    return {title: of_title for title, of_title in found.items() if len(of_title) >= 3}


def _names(results: Sequence[Result]) -> list[str]:
    return [one.name for one in results[0].found]


def _write(folder: Path, results: Sequence[Result]) -> None:
    by_depth = _by_depth(results)
    lines: dict[str, dict[str, Line]] = {
        title: {name: line for name in _names(of_title) if (line := line_through(of_title, name)) is not None}
        for title, of_title in by_depth.items()
    }
    write_whole(folder / "bench.json", lambda path: path.write_text(to_json(results, lines)))
    write_whole(folder / "time.png", lambda path: plot_times(path, results))
    for i, (title, of_title) in enumerate(by_depth.items()):
        plot_depths(folder / (f"depth-{i + 1}.png" if i else "depth.png"), of_title, title)
