"""The numbers of a run, row by row, and their file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

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
    values = {k: v if math.isfinite(v) else None for k, v in row._asdict().items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")
