"""The numbers of a run, row by row, and their file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

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


def to_json(row: NamedTuple) -> str:
    """The fields of a row as an object on one line."""
    is_number = lambda v: not isinstance(v, float) or math.isfinite(v)
    return json.dumps({k: v if is_number(v) else None for k, v in row._asdict().items()})
