"""The training loop: steps, evaluations, and the numbers that it reports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from adalomo_jax.inputs import InputError, batch_parts, mesh_sizes, one_line
from adalomo_jax.text.batches import evaluation_batches, training_batches
from adalomo_jax.text.data import Data
from adalomo_jax.training.checkpoints.record import Record
from adalomo_jax.training.config import FinetuneConfig, checkpoint_interval, evaluation_interval
from adalomo_jax.training.devices import Rows, gather, rows_here, spread, spread_batches, spread_rows
from adalomo_jax.training.memory_use import release_freed_memory
from adalomo_jax.training.metrics import EvaluationRow, Row, StepRow
from adalomo_jax.training.program import Program


class Trained(NamedTuple):
    """The end of a run."""

    params: Any
    state: Any
    tokens_per_second: float
    """Over the training steps since the start or the resumption; compilation and evaluation do not count."""
    stopped_at: int | None
    """The step after which a signal has stopped the run."""


Save = Callable[[int, Any, Any, Mapping[str, Any], float | None], None]


class Reports(NamedTuple):
    """Which rows a run has."""

    steps: int
    evaluate_every: int

    @classmethod
    def of(cls, config: FinetuneConfig) -> Reports:
        """The reports of a run with these options."""
        return cls(config.steps, evaluation_interval(config))

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation comes after a step: the last one, or a multiple of ``evaluate_every``."""
        return step % self.evaluate_every == 0 or step == self.steps

    def logs(self, step: int) -> bool:
        """Whether a step has a row: some 200 steps have one, and all evaluated steps."""
        return step % max(1, self.steps // 200) == 0 or self.evaluates(step)

    def until(self, step: int) -> list[tuple[type[Row], int]]:
        """Kinds and steps of all rows after the start, up to a step, in their order."""
        found: list[tuple[type[Row], int]] = []
        for i in range(1, step + 1):
            found += [(StepRow, i)] * self.logs(i) + [(EvaluationRow, i)] * self.evaluates(i)
        return found


class Stopwatch:
    """Seconds of training, without evaluations and checkpoints."""

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
    """The row of a step, from the metrics that `fuse` has measured."""
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
        program: has the arrays to start from.
        config: the options.
        data: what to train on.
        on_row: gets each row as soon as it is known.
        start: the checkpoint that the arrays come from; None at the first step.
        save: writes a checkpoint, as ``Saver.save``; None for no checkpoints.
        is_asked_to_stop: called after each step. If it returns True, the run saves a checkpoint and ends.
    """
    params, state = program.params, program.state
    parts = batch_parts(mesh_sizes(config.mesh, "--mesh"))
    evaluation = evaluation_batches(data, batch_size=config.batch_size, parts=parts)
    evaluation = spread(evaluation, spread_batches(program.batch_sharding))
    here = rows_here(program.batch_sharding, config.batch_size)
    batches, begin = _batches_from(here, config, data, start)
    reports, save_every = Reports.of(config), checkpoint_interval(config)
    if start is None and config.evaluate_first:
        eval_loss = _evaluate(program, params, evaluation)
        on_row(EvaluationRow.of(0, eval_loss))
        _check_first(eval_loss, "the evaluation loss before training")
    watch, last, tokens = Stopwatch(), begin, config.batch_size * config.seq_len
    stopped, step, result = False, begin, None
    while step < config.steps and not stopped:
        step, before = step + 1, result
        batch = spread_rows(next(batches), program.batch_sharding, here.rows, config.batch_size)
        result = program.step(params, state, batch)
        params, state = result.params, result.state
        jax.block_until_ready(before and before.loss)  # only one step is queued, so that a stop waits for one
        if start is None and step == 1:
            _check_first(float(result.loss), "the loss of the first step")
        at_end, eval_loss, evaluating = step == config.steps, None, reports.evaluates(step)
        if reports.logs(step):
            metrics = gather(result.metrics)
            rate = (step - last) * tokens / watch.lap()
            on_row(step_row(step, metrics, program.learning_rate(step), rate))
            last = step
        if evaluating:
            eval_loss = _evaluate(program, params, evaluation)
            on_row(EvaluationRow.of(step, eval_loss))
        stopped = is_asked_to_stop()
        saving = save is not None and (stopped or at_end or step % save_every == 0)
        if save is not None and saving:
            save(step, params, state, batches.get_state(), eval_loss)
        if evaluating or saving:
            watch.resume()
    rate = (step - begin) * tokens / watch.total if watch.total else 0.0
    return Trained(params, state, rate, step if stopped else None)


def _evaluate(program: Program, params: Any, evaluation: Any) -> float:
    """The evaluation loss. A CPU's memory for it goes back to the system: the step's would come on top."""
    loss = float(program.evaluate(params, evaluation))
    release_freed_memory()
    return loss


def _check_first(loss: float, name: str) -> None:
    """A model that starts like this cannot be trained: each step would be skipped."""
    if not math.isfinite(loss):
        raise InputError(
            f"{name} is {loss}: the model's weights or sizes (rope_theta, rms_norm_eps) are broken, or its numbers too "
            "large for --dtype; nothing was trained"
        )


def _batches_from(here: Rows, config: FinetuneConfig, data: Data, start: Record | None) -> tuple[Any, int]:
    """The iterator of this process's rows of the batches, and how many steps are done."""
    batches = iter(
        training_batches(data, batch_size=config.batch_size, seed=config.seed, process=here.part, processes=here.parts)
    )
    if start is None:
        return batches, 0
    try:
        batches.set_state(dict(start.batches))
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"the checkpoint of step {start.step} has no place in the data that can be read: {one_line(error)}"
        ) from None
    return batches, start.step
