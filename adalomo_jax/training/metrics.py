"""The numbers of a run, row by row, and their file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ConfigDict, Field

from adalomo_jax.models.fields import Fields, check
from adalomo_jax.pretrained.files import write_whole
from adalomo_jax.training.config import MOST_STEPS

MOST_NATS = 700.0
"""Above it, ``exp`` is more than a float holds."""


def perplexity(loss: float) -> float:
    """``exp(loss)``: a model would be as unsure between this many equally likely tokens."""
    return math.exp(loss) if loss < MOST_NATS else math.inf


class StepRow(NamedTuple):
    """A training step; losses are in nats a token."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    update_rms: Mapping[str, float | Sequence[float]] = {}
    """The root mean square of what the step added to each parameter, by path; for a stack, that of each layer.
    Empty, and not in the file, if it was not measured."""


class EvaluationRow(NamedTuple):
    """The loss on the fixed evaluation sequences after a step; step 0 is before training."""

    step: int
    eval_loss: float
    perplexity: float

    @classmethod
    def of(cls, step: int, eval_loss: float) -> EvaluationRow:
        """The row of a loss, with its perplexity, ``exp(loss)``."""
        return cls(step, eval_loss, perplexity(eval_loss))


Row = StepRow | EvaluationRow


class _Row(Fields):
    model_config = ConfigDict(extra="forbid")


class _StepFields(_Row):
    step: int = Field(ge=1, le=MOST_STEPS)
    loss: float | None
    grad_norm: float | None
    learning_rate: float | None
    tokens_per_second: float | None
    update_rms: dict[str, float | list[float | None] | None] = {}


class _EvaluationFields(_Row):
    step: int = Field(ge=0, le=MOST_STEPS)
    eval_loss: float | None
    perplexity: float | None


def append_row(path: Path, row: Row) -> None:
    """Add one JSON object on a line; numbers that are not finite become null, which JSON can say."""
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json(row) + "\n")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the whole file, in place of an existing one."""
    text = "".join(to_json(row) + "\n" for row in rows)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def to_json(row: NamedTuple) -> str:
    """The fields of a row as an object on one line, without mappings that are empty."""
    return json.dumps(_as_json({k: v for k, v in row._asdict().items() if v != {}}))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `append_row` has written; null is read as NaN. A line that a kill has cut off is no row.

    Raises:
        ValueError: the file cannot be read, or a line is no row; the message names it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    whole = [line for line in lines if line.endswith("\n")]
    return [_parse_row(line, f"{path}:{number}") for number, line in enumerate(whole, 1)]


def layer_medians(row: StepRow) -> np.ndarray:
    """``[layers]``: the median over a layer's matrices of the root mean square of their updates.

    Norms and biases do not count: they are vectors, whose updates are of another size. Empty if nothing is stacked.

    >>> of_layers = {"layers/mlp/kernel": [1.0, 2.0], "layers/norm/weight": [9.0, 9.0], "layers/q/kernel": [3.0, 4.0]}
    >>> layer_medians(StepRow(1, 0.0, 0.0, 0.0, 0.0, of_layers | {"embed": 7.0})).tolist()
    [2.0, 3.0]
    """
    stacks = [of_layers for path, of_layers in row.update_rms.items() if _is_matrix(path) and np.ndim(of_layers) == 1]
    return np.median(np.array(stacks, float), axis=0) if stacks else np.zeros(0)


def _is_matrix(path: str) -> bool:
    return path.rpartition("/")[2] == "kernel"


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _as_json(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_as_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse_row(line: str, place: str) -> Row:
    try:
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is no row of a run: {' '.join(str(error).split())}") from None
    is_evaluation = "eval_loss" in found
    check(_EvaluationFields if is_evaluation else _StepFields, found, f"{place} is no row of a run")
    numbers = {name: _parse_number(value) for name, value in found.items()}
    return EvaluationRow(**numbers) if is_evaluation else StepRow(**numbers)


def _parse_number(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _parse_number(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_parse_number(inner) for inner in value]
    return math.nan if value is None else value
