"""The forward pass, and the backward pass that updates each parameter as soon as its gradient is complete."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adalomo_jax.barriers import after, in_order, once_written
from adalomo_jax.fused.offload import is_on_host
from adalomo_jax.fused.plan.jaxpr import Program
from adalomo_jax.fused.plan.plan import LayerScan, Plan, Segment, Stage
from adalomo_jax.fused.run import layer_scan, segment
from adalomo_jax.fused.run.cotangents import Cotangents, accumulate
from adalomo_jax.fused.run.layers import update_order
from adalomo_jax.fused.run.segment import Context
from adalomo_jax.fused.run.updater import Squares, Statistics, Updater, all_statistics, total
from adalomo_jax.optimizers.kept import as_floats
from adalomo_jax.optimizers.per_layer import Group


class Forward(NamedTuple):
    """The results of the forward pass."""

    outputs: list[Any]
    """The program's outputs: the loss, then aux. They have a leading microbatch axis if there are microbatches."""
    context: Context
    values: dict[int, Any]
    tapes: list[Any]
    """The tape of each stage; None if the stage is pulled back already."""
    cotangents: Cotangents
    """The cotangents that the backward pass begins with."""


class Pass(NamedTuple):
    """The results of a backward pass."""

    leaves: list[Any]
    """The parameters, updated."""
    inner: Any
    """The optimizer's new state."""
    statistics: dict[Group, Statistics]


def forward(
    plan: Plan,
    leaves: Sequence[Any],
    args: Sequence[Any],
    microbatches: int | None,
    d_loss: jax.Array,
    offloads: bool = False,
) -> Forward:
    """Runs the planned program, and pulls the last stage back at once if it is not a layer scan.

    Args:
      plan: the plan of the program.
      leaves: the parameters.
      args: the other inputs; those that differ between microbatches have a leading microbatch axis.
      microbatches: the number of microbatches.
      d_loss: the cotangent of each microbatch's loss.
      offloads: whether to put the residuals of the layers of scans into host memory.
    """
    program = plan.program
    context = Context(program, plan.active, plan.batched, microbatches, range(len(program.avals)), offloads)
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
    outputs = [_of_each(plan, microbatches, v, as_floats(values[v])) for v in program.outputs]
    return Forward(outputs, context, values, tapes, cotangents)


def saved_bytes(plan: Plan, leaves: Sequence[Any], args: Sequence[Any], microbatches: int | None) -> int:
    """Bytes that `forward` keeps for the backward pass, from shapes alone: residuals, and inputs to read again."""
    there = {*plan.program.inputs, *plan.program.constants}

    def residuals(leaves, args):
        ran = forward(plan, leaves, args, microbatches, jnp.ones([], jnp.float32))
        kept, read_again = [], set[int]()
        for tape in ran.tapes:
            if isinstance(tape, layer_scan.Tape):
                kept.append(tape.residuals)
            elif tape is not None:
                kept.append(tape[0])
                read_again.update(source.key for source in tape[1].sources if source.kind == "input")
        return kept, {v: ran.values[v] for v in read_again - there}

    shapes = jax.tree.leaves(jax.eval_shape(residuals, list(leaves), list(args)))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes)


def backward(plan: Plan, ran: Forward, updater: Updater, inner: optax.OptState, leaves: Sequence[Any]) -> Pass:
    """The backward pass, including the updates."""
    written, owns, statistics = _pull_back(plan, ran, updater, inner, leaves)
    return Pass(written, updater.next_state(inner, owns, statistics), statistics)


def norm_of_gradient(plan: Plan, ran: Forward, updater: Updater) -> jax.Array:
    """The norm of the whole gradient, from a backward pass that writes nothing."""
    return norm_in(_pull_back(plan, ran, updater, None, ())[2])


def begin_after(ran: Forward, known: Any) -> Forward:
    """The same, but XLA cannot begin the backward pass before ``known`` is computed, nor merge two backward passes."""
    return ran._replace(cotangents={v: after(d, known) for v, d in ran.cotangents.items()})


def norm_in(statistics: Mapping[Group, Statistics]) -> jax.Array:
    """The norm of the whole gradient, float32."""
    return total([Squares(*map(jnp.sum, s.squares)) for s in statistics.values()]).norm()


def _pull_back(
    plan: Plan, ran: Forward, updater: Updater, inner: optax.OptState | None, leaves: Sequence[Any]
) -> tuple[list[Any], dict[Group, list[Any]], dict[Group, Statistics]]:
    """The parameters, the optimizer state of each group, and statistics; without ``inner`` it only measures."""
    cotangents, written = dict(ran.cotangents), dict(enumerate(leaves))
    owns: dict[Group, list[Any]] = {}
    statistics: dict[Group, Statistics] = {}
    for index, (stage, tape) in reversed(list(enumerate(zip(plan.stages, ran.tapes)))):
        if isinstance(stage, LayerScan):
            group = plan.group_of(index, whole=False)
            own, parts = [], None
            if inner is not None and group is not None:
                sets = update_order(stage, plan.program, any(is_on_host(leaves[i]) for i in group.leaves))
                own, parts = updater.optimizer.own(inner, group), updater.parts(group, sets)
            measure = partial(updater.measure, group)
            done = layer_scan.backward(stage, ran.context, tape, ran.values, cotangents, own, parts, measure)
            accumulate(cotangents, done.cotangents)
            if group is not None:
                owns[group] = done.own
                positions = [k for part in parts or () for k in part.weights]
                statistics[group] = all_statistics(done.statistics, positions) if parts else done.statistics
                written |= zip(group.leaves, done.weights, strict=True)
        elif tape is not None:
            there = _after_cotangents(stage, ran.values, plan.program, cotangents)
            accumulate(cotangents, segment.backward(stage, ran.context, tape, there, cotangents))
        if (group := plan.group_of(index, whole=True)) is not None:
            of_leaves = [plan.program.inputs[i] for i in group.leaves]
            gradients = [cotangents[v] if v in cotangents else plan.program.zeros(v) for v in of_leaves]
            if inner is None:
                statistics[group] = updater.measure(group, gradients)
            else:
                weights, own = [leaves[i] for i in group.leaves], updater.optimizer.own(inner, group)
                weights, owns[group], statistics[group] = updater(group, None, weights, gradients, own)
                # Otherwise weights whose gradient a product makes in another axis order wait in it for a final copy.
                weights = jax.tree.map(in_order, weights)
                written |= zip(group.leaves, weights, strict=True)
                # Cotangents of written leaves and of finished stages are not read again; lists of layers have many.
                done_with = {*of_leaves, *(v for stage in plan.stages[index:] for v in stage.outputs)}
                cotangents = {v: once_written(d, weights) for v, d in cotangents.items() if v not in done_with}
    return list(written.values()), owns, statistics


def _after_cotangents(
    stage: Segment, values: Mapping[int, Any], program: Program, cotangents: Cotangents
) -> dict[int, Any]:
    """The values, but those that the segment reads wait until the cotangents of its outputs are known.

    XLA's CPU compiler drops the optimization barriers of `jax.checkpoint`, and recomputes all layers too early.
    """
    known = [cotangents[v] for v in stage.outputs if v in cotangents]
    made = [v for v in stage.inputs if v not in program.inputs and v not in program.constants]
    floats = [v for v in made if jnp.issubdtype(program.avals[v].dtype, jnp.floating)]
    return {**values, **{v: after(values[v], known) for v in floats}}


def _forward(stage: Stage, context: Context, values: dict[int, Any]) -> Any:
    if isinstance(stage, LayerScan):
        return layer_scan.forward(stage, context, values)
    return segment.forward(stage, context, values)


def _of_each(plan: Plan, microbatches: int | None, v: int, x: Any) -> Any:
    """A value, repeated for each microbatch if it is the same for all."""
    return x if microbatches is None or v in plan.batched else jnp.broadcast_to(x, (microbatches, *jnp.shape(x)))
