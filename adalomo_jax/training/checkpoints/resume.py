"""How a run continues from a checkpoint: which one, whether it belongs to this run, and the errors if not."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adalomo_jax.inputs import InputError, one_line
from adalomo_jax.pretrained.by_name import Pretrained
from adalomo_jax.pretrained.hub import is_hub_name
from adalomo_jax.pretrained.json_files import read_json
from adalomo_jax.pretrained.source import INDEX, SINGLE, SafetensorsSource
from adalomo_jax.run_files import METRICS
from adalomo_jax.text.data import Data
from adalomo_jax.training.checkpoints.fingerprints import data_fingerprint
from adalomo_jax.training.checkpoints.record import Origin, Record
from adalomo_jax.training.checkpoints.save import FOLDER, foreign_in, read_record, restore, steps_in
from adalomo_jax.training.config import FinetuneConfig, evaluation_interval
from adalomo_jax.training.loop import Reports
from adalomo_jax.training.metrics import EvaluationRow, Row, read_rows
from adalomo_jax.training.schedule import peak_learning_rate, warmup_steps

FREE = (
    *("fused", "attention", "mesh", "coordinator", "processes", "process"),
    *("evaluate_first", "checkpoint_every", "keep", "resume", "resume_step", "output", "find_lr"),
    *("model", "data", "split", "subset", "columns", "skip_bad"),
)
"""Options that may differ when a run continues: they change only rounding, or `Origin` has what they led to."""


_EARLIER = "earlier-"
"""How the name of a file of weights begins until the run has come to its end again."""


def origin_of(config: FinetuneConfig, model: Pretrained, data: Data) -> Origin:
    """The origin of a run with these options."""
    return _origin(config, model, data_fingerprint(data))


def _origin(config: FinetuneConfig, model: Pretrained, data: str) -> Origin:
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    options |= {
        "learning_rate": peak_learning_rate(config),
        "warmup_steps": warmup_steps(config),
        "evaluate_every": evaluation_interval(config),
    }
    return Origin(options, {"name": model.name, **dataclasses.asdict(model.config)}, data, _paths(config))


def _paths(config: FinetuneConfig) -> list[str]:
    return [str(path) if is_hub_name(str(path)) else str(path.absolute()) for path in config.data or ()]


def is_finished(folder: Path) -> bool:
    """Whether a run has left its whole weights there, and its summary, which it writes last."""
    try:
        return bool(read_json(folder / "summary.json")) and bool(SafetensorsSource(folder).shapes)
    except ValueError:
        return False


def check_finished(config: FinetuneConfig, folder: Path, model: Pretrained, read: Callable[[], Data]) -> None:
    """Raise InputError if the finished run in a folder is not the one that the options ask for.

    Without checkpoints there is nothing to compare. The text is read only if its paths are not those of the run. The
    rest takes no time.
    """
    steps = steps_in(checkpoints_of(folder))
    if steps:
        record = _record(folder, steps[-1])
        was = record.origin
        data = was.data if was.paths == _paths(config) else data_fingerprint(read())
        _check_same(folder, record, _origin(config, model, data))


def set_weights_aside(folder: Path) -> None:
    """Keep earlier weights from marking a run as finished, if it continues from before its end.

    They are renamed, not removed: until the run has come to its end again, they are the only ones.
    """
    for name in (SINGLE, INDEX):
        if (folder / name).exists():
            (folder / name).replace(folder / f"{_EARLIER}{name}")


def drop_weights_set_aside(folder: Path) -> None:
    """Call it once the last step's checkpoint, with the new ones, is whole. A run without checkpoints keeps both."""
    for name in (SINGLE, INDEX):
        (folder / f"{_EARLIER}{name}").unlink(missing_ok=True)


def checkpoints_of(folder: Path) -> Path:
    """The folder of the checkpoints of a run in this folder."""
    return folder / FOLDER


def find_checkpoint(config: FinetuneConfig, folder: Path, origin: Origin) -> Record | None:
    """The checkpoint to continue from, with ``--resume``; None to begin.

    Raises:
        InputError: it is damaged or of another run. No other checkpoint takes its place.
    """
    steps = steps_in(checkpoints_of(folder)) if config.resume else []
    if not steps and config.resume_step is None:
        return None
    step = config.resume_step or steps[-1]
    if step not in steps:
        there = f"only those of the steps {', '.join(map(str, steps))}" if steps else "none at all"
        raise InputError(f"--resume-step {step}: {folder} has no checkpoint of this step, {there}")
    foreign = foreign_in(checkpoints_of(folder))
    if foreign:
        raise InputError(f"{foreign[0]} has no record of a run, and may be somebody else's: move it out of that folder")
    record = _record(folder, step)
    _check_same(folder, record, origin)
    return record


def differences(was: Origin, now: Origin) -> list[str]:
    """What differs between two runs, each with both values."""
    name = lambda key: f"--{key.replace('_', '-')}"
    found = [f"{name(key)} was {a}, and is {b}" for key, a, b in _differing(was.options, now.options)]
    sizes = [f"--model: its {key} was {a}, and is {b}" for key, a, b in _differing(was.model, now.model)]
    if was.data != now.data:
        sizes.append(f"--data gave the sequences {was.data[:12]}, and gives {now.data[:12]}")
    return found + sizes


def unusable(folder: Path, step: int, error: Exception) -> InputError:
    """The error for a checkpoint that cannot be read, with the older ones."""
    older = [other for other in steps_in(checkpoints_of(folder)) if other < step]
    steps = ", ".join(map(str, older))
    way_out = (
        f"older ones are of the steps {steps}; to take one, give --resume-step {older[-1]}"
        if older
        else ("there is no older one; start again in another --output")
    )
    return InputError(f"the checkpoint of step {step} in {folder} is damaged: {one_line(error)}; {way_out}")


def restored(folder: Path, record: Record, params: Any, state: Any) -> tuple[Any, Any]:
    """The arrays of the checkpoint that `find_checkpoint` has found, from their shapes."""
    try:
        return restore(checkpoints_of(folder) / str(record.step), record, params, state)
    except ValueError as error:
        raise unusable(folder, record.step, error) from None


def earlier_rows(config: FinetuneConfig, folder: Path, start: Record | None) -> list[Row]:
    """The rows of ``metrics.jsonl`` up to the step that a run continues from.

    Raises:
        InputError: they are not the rows that the run has written: some are missing, repeated, or of another run.
    """
    if start is None:
        return []
    path = folder / METRICS
    if not path.exists():
        raise InputError(
            f"{folder} has checkpoints and no {METRICS}, whose rows the run continues: copy it there, too, from "
            "where the run was"
        )
    try:
        rows = [row for row in read_rows(path) if row.step <= start.step]
    except ValueError as error:
        raise InputError(f"{one_line(error)}; remove what is broken there, and give the same command again") from None
    found, first = [(type(row), row.step) for row in rows], [(EvaluationRow, 0)]
    due = (first if found[:1] == first else []) + Reports.of(config).until(start.step)
    if found != due:
        at = next(i for i, (x, y) in enumerate(itertools.zip_longest(found, due)) if x != y)
        name = lambda row: f"the {'evaluation' if row[0] is EvaluationRow else 'row'} of step {row[1]}"
        got = name(found[at]) if at < len(found) else f"no more up to step {start.step}"
        raise InputError(
            f"{path} must continue with {name(due[at]) if at < len(due) else 'none'} after {at} rows, got {got}: put "
            "the file of that run back, or continue from an earlier step with --resume-step"
        )
    return rows


def _record(folder: Path, step: int) -> Record:
    try:
        return read_record(checkpoints_of(folder) / str(step))
    except ValueError as error:
        raise unusable(folder, step, error) from None


def _check_same(folder: Path, record: Record, origin: Origin) -> None:
    differing = differences(record.origin, origin)
    if differing:
        raise InputError(
            f"the checkpoint of step {record.step} in {folder} is of a run with other options: {'; '.join(differing)}; "
            "give the same ones, or name another --output"
        )


def _differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    was, now = (json.loads(json.dumps(dict(values))) for values in (was, now))  # a checkpoint has lists for tuples
    return [(key, was.get(key), now.get(key)) for key in {**was, **now} if was.get(key) != now.get(key)]
