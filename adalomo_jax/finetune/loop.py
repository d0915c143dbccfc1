"""The training loop: steps, evaluations, and the numbers that it reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from adalomo_jax.finetune.checkpoints import Record
from adalomo_jax.finetune.config import (
    FinetuneConfig,
    batch_parts,
    checkpoint_interval,
    evaluation_interval,
    mesh_sizes,
)
from adalomo_jax.finetune.data import Data, evaluation_batches, training_batches
from adalomo_jax.finetune.devices import Rows, gather, rows_here, spread, spread_batches, spread_rows
from adalomo_jax.finetune.metrics import EvaluationRow, Row, StepRow
from adalomo_jax.finetune.program import Program


class Trained(NamedTuple):
    """The end of a run."""

    params: Any
    state: Any
    tokens_per_second: float
    """Over the training steps since the start or the resumption; compilation and evaluation do not count."""
    stopped_at: int | None
    """The step after which a signal has stopped it."""


Save = Callable[[int, Any, Any, Mapping[str, Any], float | None], None]


class Stopwatch:
    """Seconds of training, evaluations and checkpoints left out."""

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


def train(
    program: Program,
    config: FinetuneConfig,
    data: Data,
    on_row: Callable[[Row], None],
    *,
    start: Record | None = None,
    save: Save | None = None,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Run all steps; ``on_row`` gets some 200 step rows and the evaluations. Consumes ``program``'s arrays.

    Args:
        program: with arrays as they are at the start.
        config: the options.
        data: what to train on.
        on_row: gets each row as soon as it is known.
        start: the checkpoint that the arrays are of; None at the first step.
        save: writes a checkpoint, as ``Saver.save``; None for no checkpoints.
        is_asked_to_stop: called after each step; where it says so, a checkpoint is saved and the run is over.
    """
    params, state = program.params, program.state
    parts = batch_parts(mesh_sizes(config.mesh, "--mesh"))
    evaluation = evaluation_batches(data, batch_size=config.batch_size, parts=parts)
    evaluation = spread(evaluation, spread_batches(program.batch_sharding))
    here = rows_here(program.batch_sharding, config.batch_size)
    batches, begin = _batches_from(here, config, data, start)
    log_every, evaluate_every = max(1, config.steps // 200), evaluation_interval(config)
    save_every = checkpoint_interval(config)
    if start is None:
        on_row(EvaluationRow.of(0, float(program.evaluate(params, evaluation))))
    watch, last, tokens = Stopwatch(), begin, config.batch_size * config.seq_len
    stopped, step, result = False, begin, None
    while step < config.steps and not stopped:
        step, before = step + 1, result
        batch = spread_rows(next(batches), program.batch_sharding, here.rows, config.batch_size)
        result = program.step(params, state, batch)
        params, state = result.params, result.state
        jax.block_until_ready(before and before.loss)  # one step waits for the device, so that a stop waits for one
        at_end, eval_loss = step == config.steps, None
        evaluating = step % evaluate_every == 0 or at_end
        if step % log_every == 0 or evaluating:
            metrics = gather(result.metrics)
            rate = (step - last) * tokens / watch.lap()
            on_row(step_row(step, metrics, float(program.learning_rates[step - 1]), rate))
            last = step
        if evaluating:
            eval_loss = float(program.evaluate(params, evaluation))
            on_row(EvaluationRow.of(step, eval_loss))
        stopped = is_asked_to_stop()
        saving = save is not None and (stopped or at_end or step % save_every == 0)
        if save is not None and saving:
            save(step, params, state, batches.get_state(), eval_loss)
        if evaluating or saving:
            watch.resume()
    rate = (step - begin) * tokens / watch.total if watch.total else 0.0
    return Trained(params, state, rate, step if stopped else None)


def _batches_from(here: Rows, config: FinetuneConfig, data: Data, start: Record | None) -> tuple[Any, int]:
    """The iterator of this process's rows of the batches, and how many steps are done."""
    batches = iter(
        training_batches(data, batch_size=config.batch_size, seed=config.seed, process=here.part, processes=here.parts)
    )
    if start is None:
        return batches, 0
    batches.set_state(dict(start.batches))
    return batches, start.step
