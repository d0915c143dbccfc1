"""The numbers of a run, row by row, and their file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adalomo_jax.pretrained.files import write_whole

MOST_NATS = 700.0
"""Above it, ``exp`` is more than a float holds."""


def perplexity(loss: float) -> float:
    """``exp(loss)``: how many equally likely tokens a model would be as unsure of."""
    return math.exp(loss) if loss < MOST_NATS else math.inf


class StepRow(NamedTuple):
    """A training step; losses are in nats a token."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float


class EvaluationRow(NamedTuple):
    """The loss on the fixed evaluation sequences after a step; step 0 is before training."""

    step: int
    eval_loss: float
    perplexity: float

    @classmethod
    def of(cls, step: int, eval_loss: float) -> EvaluationRow:
        """With the perplexity of a loss, ``exp(loss)``."""
        return cls(step, eval_loss, perplexity(eval_loss))


Row = StepRow | EvaluationRow


def append_row(path: Path, row: Row) -> None:
    """Add one JSON object on a line; numbers that are not finite become null, which JSON can say."""
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json(row) + "\n")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """The whole file anew, in place of what is there."""
    write_whole(
        path, lambda partial: partial.write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")
    )


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, in order; none where there is no file. A line that a kill has cut off is left out."""
    if not path.exists():
        return []
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            values: dict[str, Any] = {k: math.nan if v is None else v for k, v in json.loads(line).items()}
            rows.append(StepRow(**values) if "loss" in values else EvaluationRow(**values))
    return rows


def to_json(row: NamedTuple) -> str:
    """The fields of a row as an object on one line."""
    is_number = lambda v: not isinstance(v, float) or math.isfinite(v)
    return json.dumps({k: v if is_number(v) else None for k, v in row._asdict().items()})
