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
        return cls(step, eval_loss, math.exp(eval_loss) if eval_loss < MOST_NATS else math.inf)


Row = StepRow | EvaluationRow


def append_row(path: Path, row: Row) -> None:
    """Add one JSON object on a line; numbers that are not finite become null, which JSON can say."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """The whole file anew, in place of what is there."""
    write_whole(path, lambda partial: partial.write_text("".join(map(_line, rows)), encoding="utf-8"))


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


def _line(row: Row) -> str:
    values = {k: v if math.isfinite(v) else None for k, v in row._asdict().items()}
    return json.dumps(values) + "\n"
