"""The training loop: steps, evaluations, and the numbers that it reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from adalomo_jax.finetune.config import FinetuneConfig, batch_parts, mesh_sizes
from adalomo_jax.finetune.data import Text, evaluation_batches, training_batch
from adalomo_jax.finetune.devices import spread, spread_batches
from adalomo_jax.finetune.metrics import EvaluationRow, Row, StepRow
from adalomo_jax.finetune.program import Program


class Trained(NamedTuple):
    """The end of a run."""

    params: Any
    state: Any
    tokens_per_second: float
    """Over all training steps; compilation and evaluation do not count."""


class Stopwatch:
    """Seconds of training, evaluations left out."""

    def __init__(self):
        self.total, self._mark = 0.0, time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap or resumption, added to the total."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self.total += seconds
        return seconds

    def resume(self) -> None:
        """Leave out the time since the last lap."""
        self._mark = time.perf_counter()


def train(program: Program, config: FinetuneConfig, text: Text, on_row: Callable[[Row], None]) -> Trained:
    """Run all steps; ``on_row`` gets some 200 step rows and some ten evaluations. Consumes ``program``'s arrays."""
    params, state = program.params, program.state
    parts = batch_parts(mesh_sizes(config.mesh, "--mesh"))
    batches_NBT = evaluation_batches(text, batch_size=config.batch_size, seq_len=config.seq_len, parts=parts)
    tokens_NBT = spread(batches_NBT, spread_batches(program.batch_sharding))
    log_every, evaluate_every = max(1, config.steps // 200), max(1, config.steps // 10)
    on_row(EvaluationRow(0, float(program.evaluate(params, tokens_NBT))))
    watch, last = Stopwatch(), 0
    for step in range(1, config.steps + 1):
        tokens_BT = training_batch(
            text, seed=config.seed, step=step, batch_size=config.batch_size, seq_len=config.seq_len
        )
        result = program.step(params, state, spread(tokens_BT, program.batch_sharding))
        params, state = result.params, result.state
        evaluating = step % evaluate_every == 0 or step == config.steps
        if step % log_every == 0 or evaluating:
            loss, grad_norm = float(result.loss), float(result.metrics["grad_norm"])
            rate = (step - last) * tokens_BT.size / watch.lap()
            on_row(StepRow(step, loss, grad_norm, float(program.learning_rates[step - 1]), rate))
            last = step
        if evaluating:
            on_row(EvaluationRow(step, float(program.evaluate(params, tokens_NBT))))
            watch.resume()
    tokens = config.steps * config.batch_size * config.seq_len
    return Trained(params, state, tokens / watch.total)
