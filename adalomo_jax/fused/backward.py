"""The forward pass, and the backward pass that updates each parameter as soon as its gradient is complete."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adalomo_jax.fused import scan, segment
from adalomo_jax.fused.plan import LayerScan, Plan, Segment, Stage
from adalomo_jax.fused.segment import Context, Cotangents, accumulate
from adalomo_jax.fused.stacks import UpdateLayer, after
from adalomo_jax.fused.updater import Statistics, Updater
from adalomo_jax.optimizers.per_layer import Group


class Forward(NamedTuple):
    """What the forward pass leaves."""

    outputs: list[Any]
    """The program's: the loss, then aux. With a leading microbatch axis where there are microbatches."""
    values: dict[int, Any]
    tapes: list[Any]
    """Of each stage; None where it has been pulled back already."""
    cotangents: Cotangents
    """What the backward pass begins with."""


class Pass(NamedTuple):
    """What a backward pass leaves."""

    leaves: list[Any]
    """The parameters, updated."""
    inner: Any
    """The optimizer's new state."""
    statistics: dict[Group, Statistics]


def forward(
    plan: Plan, leaves: Sequence[Any], args: Sequence[Any], microbatches: int | None, d_loss: jax.Array
) -> Forward:
    """Runs the planned program, and pulls back the stage that comes last where that is not a layer scan.

    Args:
      plan: of the program.
      leaves: the parameters.
      args: the other inputs; those that differ between microbatches with a leading microbatch axis.
      microbatches: how many there are.
      d_loss: the cotangent of the loss, of each microbatch.
    """
    context, program = _context(plan, microbatches), plan.program
    values = {**program.constants, **dict(zip(program.inputs, [*leaves, *args], strict=True))}
    loss, tapes = program.outputs[0], []
    seed = {loss: d_loss.astype(program.avals[loss].dtype)} if loss in plan.active else {}
    if microbatches is not None and loss in plan.batched:
        seed = {v: jnp.broadcast_to(d, (microbatches,)) for v, d in seed.items()}
    elif microbatches is not None:
        seed = {v: d * microbatches for v, d in seed.items()}
    for stage in plan.stages[:-1]:
        tapes.append(_forward(stage, context, values))
    last = plan.stages[-1]
    if isinstance(last, LayerScan) or loss not in seed or loss not in last.outputs:
        tapes.append(_forward(last, context, values))
        cotangents = seed
    else:
        cotangents = segment.forward_and_backward(last, context, values, seed)
        tapes.append(None)
    outputs = [_of_each(plan, microbatches, v, values[v]) for v in program.outputs]
    return Forward(outputs, values, tapes, cotangents)


def backward(
    plan: Plan,
    ran: Forward,
    microbatches: int | None,
    updater: Updater,
    inner: optax.OptState,
    leaves: Sequence[Any],
) -> Pass:
    """The backward pass with the updates in it."""
    visit = _Visit(updater, inner, leaves)
    _pull_back(plan, ran, microbatches, visit)
    return Pass(visit.written, updater.next_state(inner, visit.owns), visit.statistics)


def squares_of_gradient(plan: Plan, ran: Forward, microbatches: int | None, updater: Updater) -> jax.Array:
    """The sum of the squares of the whole gradient, by a backward pass that writes nothing."""
    visit = _Visit(updater, None, ())
    _pull_back(plan, ran, microbatches, visit)
    return sum_of_squares_in(visit.statistics)


def begin_after(ran: Forward, known: Any) -> Forward:
    """The same, but so that XLA cannot begin the backward pass before something is known, nor merge two of them."""
    return ran._replace(cotangents={v: after(d, known) for v, d in ran.cotangents.items()})


def sum_of_squares_in(statistics: Mapping[Group, Statistics]) -> jax.Array:
    """Of the whole gradient, float32."""
    return sum((jnp.sum(s.squares) for s in statistics.values()), start=jnp.zeros([], jnp.float32))


class _Visit:
    """What a backward pass does with each gradient: updates with it, or only measures it where there is no state."""

    def __init__(self, updater: Updater, inner: optax.OptState | None, leaves: Sequence[Any]):
        self.updater, self.inner, self.leaves = updater, inner, leaves
        self.written, self.owns, self.statistics = list(leaves), {}, {}

    def own(self, group: Group | None) -> list[Any]:
        return [] if self.inner is None or group is None else self.updater.optimizer.own(self.inner, group)

    def layers(self, group: Group | None) -> UpdateLayer | None:
        return None if self.inner is None or group is None else partial(self.updater, group)

    def stacks(self, group: Group, done: scan.Pulled) -> None:
        self.owns[group], self.statistics[group] = done.own, done.statistics
        if self.inner is not None:
            self._write(group, done.weights)

    def whole(self, group: Group, gradients: list[Any]) -> None:
        if self.inner is None:
            self.statistics[group] = self.updater.measure(gradients)
            return
        weights = [self.leaves[i] for i in group.leaves]
        updated = self.updater(group, None, weights, gradients, self.own(group))
        weights, self.owns[group], self.statistics[group] = updated
        self._write(group, weights)

    def _write(self, group: Group, weights: Sequence[Any]) -> None:
        for i, leaf in zip(group.leaves, weights, strict=True):
            self.written[i] = leaf


def _pull_back(plan: Plan, ran: Forward, microbatches: int | None, visit: _Visit) -> None:
    context, values = _context(plan, microbatches), plan.program.inputs
    cotangents = dict(ran.cotangents)
    for index, (stage, tape) in reversed(list(enumerate(zip(plan.stages, ran.tapes)))):
        if isinstance(stage, LayerScan):
            group = plan.group_of(index, whole=False)
            own, update_layer = visit.own(group), visit.layers(group)
            done = scan.backward(stage, context, tape, ran.values, cotangents, own, update_layer, visit.updater.measure)
            accumulate(cotangents, done.cotangents)
            if group is not None:
                visit.stacks(group, done)
        elif tape is not None:
            there = _after_cotangents(stage, ran.values, values, cotangents)
            accumulate(cotangents, segment.backward(stage, context, tape, there, cotangents))
        if (group := plan.group_of(index, whole=True)) is not None:
            of_leaves = [values[i] for i in group.leaves]
            visit.whole(group, [cotangents[v] if v in cotangents else plan.program.zeros(v) for v in of_leaves])


def _after_cotangents(
    stage: Segment, values: Mapping[int, Any], inputs: Sequence[int], cotangents: Cotangents
) -> dict[int, Any]:
    """The values, but for the way back what the segment reads is there only when its cotangents are.

    XLA's CPU compiler drops the optimization barriers of `jax.checkpoint`, and recomputes all layers too early.
    """
    known = [cotangents[v] for v in stage.outputs if v in cotangents]
    read = {v: values[v] for v in stage.inputs if v not in inputs and jnp.issubdtype(values[v].dtype, jnp.floating)}
    return {**values, **{v: after(x, known) for v, x in read.items()}}


def _context(plan: Plan, microbatches: int | None) -> Context:
    return Context(plan.program, plan.active, plan.batched, microbatches, again=range(len(plan.program.avals)))


def _forward(stage: Stage, context: Context, values: dict[int, Any]) -> Any:
    if isinstance(stage, LayerScan):
        return scan.forward(stage, context, values)
    return segment.forward(stage, context, values)


def _of_each(plan: Plan, microbatches: int | None, v: int, x: Any) -> Any:
    """A value, repeated for each microbatch where it is the same for all."""
    return x if microbatches is None or v in plan.batched else jnp.broadcast_to(x, (microbatches, *jnp.shape(x)))
