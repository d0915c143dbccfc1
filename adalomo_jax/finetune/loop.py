"""The training loop: steps, evaluations, and the numbers that it reports."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from adalomo_jax.finetune.config import FinetuneConfig, batch_parts, evaluation_interval, mesh_sizes
from adalomo_jax.finetune.data import Data, evaluation_batches, training_batches
from adalomo_jax.finetune.devices import gather, rows_here, spread, spread_batches, spread_rows
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


def step_row(step: int, metrics: dict[str, Any], learning_rate: float, tokens_per_second: float) -> StepRow:
    """The row of a step, from what `fuse` has measured in it."""
    update_rms = {path: of_layers.tolist() for path, of_layers in metrics.get("update_rms", {}).items()}
    return StepRow(
        step, float(metrics["loss"]), float(metrics["grad_norm"]), learning_rate, tokens_per_second, update_rms
    )


def train(program: Program, config: FinetuneConfig, data: Data, on_row: Callable[[Row], None]) -> Trained:
    """Run all steps; ``on_row`` gets some 200 step rows and the evaluations. Consumes ``program``'s arrays."""
    params, state = program.params, program.state
    parts = batch_parts(mesh_sizes(config.mesh, "--mesh"))
    evaluation = evaluation_batches(data, batch_size=config.batch_size, parts=parts)
    evaluation = spread(evaluation, spread_batches(program.batch_sharding))
    rows = rows_here(program.batch_sharding, config.batch_size)
    batches = training_batches(
        data, batch_size=config.batch_size, seed=config.seed, process=rows.part, processes=rows.parts
    )
    log_every, evaluate_every = max(1, config.steps // 200), evaluation_interval(config)
    on_row(EvaluationRow.of(0, float(program.evaluate(params, evaluation))))
    watch, last, tokens = Stopwatch(), 0, config.batch_size * config.seq_len
    for step, batch in enumerate(itertools.islice(batches, config.steps), 1):
        result = program.step(params, state, spread_rows(batch, program.batch_sharding, config.batch_size))
        params, state = result.params, result.state
        evaluating = step % evaluate_every == 0 or step == config.steps
        if step % log_every == 0 or evaluating:
            metrics = gather(result.metrics)
            rate = (step - last) * tokens / watch.lap()
            on_row(step_row(step, metrics, float(program.learning_rates[step - 1]), rate))
            last = step
        if evaluating:
            on_row(EvaluationRow.of(step, float(program.evaluate(params, evaluation))))
            watch.resume()
    return Trained(params, state, config.steps * tokens / watch.total)
