"""Runs a scan over layers forward, and backward, where each layer is updated as soon as its gradient is complete.

The forward loop, too, has the stacks in its carry, behind a barrier: otherwise XLA hoists a cast of them out of the
loop, and makes a copy of all the weights in the narrower dtype.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from adalomo_jax.barriers import after, barrier, once_written
from adalomo_jax.fused.offload import fetch, put_on_host
from adalomo_jax.fused.plan.jaxpr import evaluate
from adalomo_jax.fused.plan.plan import LayerScan
from adalomo_jax.fused.run import segment
from adalomo_jax.fused.run.cotangents import Cotangents, accumulate
from adalomo_jax.fused.run.in_place import Part, start, update_parts
from adalomo_jax.fused.run.layers import received, slices_at
from adalomo_jax.fused.run.segment import Context, Layout, Residuals, sum_dtype, zero_sum, zeros
from adalomo_jax.optimizers.kept import as_floats
from adalomo_jax.optimizers.precision import add, promoted


class Tape(NamedTuple):
    """What the backward loop needs from the forward loop."""

    stacks: dict[int, Any]
    """The stacks, by their number in the program."""
    residuals: list[Residuals]
    """The residuals of each segment of the body, with a leading layer axis."""
    layouts: list[Layout]


class Pulled(NamedTuple):
    """The results of the backward loop."""

    weights: list[Any]
    """The trained stacks."""
    own: list[Any]
    """Their optimizer state."""
    statistics: Any
    """Those of each part of a layer, or of the layer if it is not updated; with a leading layer axis."""
    cotangents: Cotangents
    """The cotangents of the values that the scan reads."""


class _Operands(NamedTuple):
    """A scan's operands, except those from stacks, by their number in the body."""

    consts: dict[int, Any]
    carry: dict[int, Any]
    xs: dict[int, Any]
    """The layer axis comes first, before a microbatch axis."""


def forward(stage: LayerScan, outer: Context, values: dict[int, Any]) -> Tape:
    """Runs the scan on the program's ``values``, adds its results to them, and returns the tape."""
    scan, context = stage.scan, _context(stage, outer)
    consts, carry, xs = _operands(stage, outer, context, values)
    stacks = {stack.value: values[stack.value] for stack in stage.stacks}
    layouts: list[Layout] = []

    def iteration(carry_and_stacks, i_and_xs):
        (carry, stacks), (i, xs) = carry_and_stacks, i_and_xs
        layers, _ = received(stage, outer, slices_at(stage, stacks, i, stacks))
        there = _invariant(stage, consts) | xs | layers | carry
        tapes = [segment.forward(part, context, there) for part in stage.body]
        layouts[:] = [layout for _, layout in tapes]
        new_carry = {v: _for_each(context, v, context, out, there[out]) for v, out in zip(carry, scan.body.outputs)}
        ys = [there[scan.body.outputs[p]] for p in stage.read_ys]
        residuals = [residuals for residuals, _ in tapes]
        if outer.offloads:
            residuals = jax.tree.map(put_on_host, residuals)
        return (new_carry, barrier(stacks)), (ys, residuals)

    (carry, stacks), (ys, residuals) = lax.scan(
        iteration, (carry, stacks), (jnp.arange(scan.length), xs), reverse=scan.reverse
    )
    values.update(zip(stage.outputs, carry.values()))
    for p, y in zip(stage.read_ys, ys):
        values[stage.outputs[p]] = _swap_if_batched(context, scan.body.outputs[p], y)
    return Tape(stacks, residuals, layouts)


def backward(
    stage: LayerScan,
    outer: Context,
    tape: Tape,
    values: Mapping[int, Any],
    cotangents: Cotangents,
    own: list[Any],
    parts: Sequence[Part] | None,
    measure: Callable[[list[Any]], Any],
) -> Pulled:
    """Pulls the scan back layer by layer, updating each layer with the gradient taken at its old weights.

    Args:
      stage: the scan.
      outer: the context of the program.
      tape: what `forward` returned.
      values: the program's values.
      cotangents: those of the scan's outputs, as far as they have any.
      own: the optimizer state of the trained stacks, with a leading layer axis.
      parts: the optimizer's step on one layer of some trained stacks at a time; None leaves everything as it is.
      measure: makes the statistics of a layer's gradients if the layer is not updated.
    """
    scan, body, context = stage.scan, stage.scan.body, _context(stage, outer)
    consts, carry, xs = _operands(stage, outer, context, values)
    d_outputs = {p: cotangents[v] for p, v in enumerate(stage.outputs) if v in cotangents}
    d_carry = {v: d_outputs.get(p, zeros(context, v)) for p, v in enumerate(carry) if v in stage.active}
    d_ys = {p: _swap_if_batched(context, body.outputs[p], d) for p, d in d_outputs.items() if p >= scan.num_carry}
    constants, axes = _invariant(stage, consts), [stack.axis for stack in stage.trained]
    first, stride = (0, 1) if scan.reverse else (scan.length - 1, -1)
    numbers, home = [stack.value for stack in stage.trained], stage.homes
    read = [stage.read_by[s] | {v for v in home if home[v] == s} for s in range(len(stage.body))]
    several = sum(map(bool, read)) > 1
    all_parts = parts or ()
    home_of_part = [min(home[numbers[k]] for k in part.weights) for part in all_parts]

    def iteration(state, x):
        d_carry, d_consts, stacks, frozen = state
        i, xs, residuals, d_ys = jax.tree.map(fetch, x)
        before, there = dict(zip(numbers, stacks.weights)) | frozen, constants | xs
        layers, gradients, statistics = {}, {}, {}
        d = _of_outputs(stage, context, d_carry, d_ys)
        for s, part in reversed(list(enumerate(stage.body))):
            # Otherwise XLA may read the weights of several segments at once.
            at = after(i, [d[v] for v in part.outputs if v in d]) if several else i
            slices = slices_at(stage, before, at, read[s])
            inputs, pull_layers = received(stage, outer, slices)
            made = segment.backward(part, context, (residuals[s], tape.layouts[s]), there | inputs, d)
            accumulate(d, made)
            of_layers = pull_layers(d)
            for k in (k for k, value in enumerate(numbers) if home[value] == s):
                layers[k], gradients[k] = slices[numbers[k]], of_layers[numbers[k]]
            due = [p for p, at_home in enumerate(home_of_part) if at_home == s]
            if due:
                parts_due = [all_parts[p] for p in due]
                stacks, of_due = update_parts(stacks, axes, i, i + stride, layers, gradients, parts_due, made)
                statistics |= zip(due, of_due)
                written = [stacks.weights[k] for part in parts_due for k in part.weights]
                d |= {v: once_written(d[v], written) for v in part.inputs if several and v in made and v not in inputs}
        d_carry = {v: d.get(v, zeros(context, v)).astype(sum_dtype(context, v)) for v in d_carry}
        d_consts = {v: add(total, d[v]).astype(total.dtype) if v in d else total for v, total in d_consts.items()}
        d_xs = {v: d.get(v, zeros(context, v)) for v in xs if v in stage.active}
        if parts is None:
            found = measure([gradients[k] for k in range(len(numbers))])
            return (d_carry, d_consts, barrier(stacks), barrier(frozen)), (d_xs, found)
        return (d_carry, d_consts, stacks, barrier(frozen)), (d_xs, [statistics[p] for p in range(len(all_parts))])

    stacks = start([tape.stacks[stack.value] for stack in stage.trained], own, first)
    frozen = {stack.value: tape.stacks[stack.value] for stack in stage.stacks if not stack.trained}
    (d_carry, d_consts, stacks, _), (d_xs, statistics) = lax.scan(
        iteration,
        (
            {v: d.astype(sum_dtype(context, v)) for v, d in d_carry.items()},
            {v: zero_sum(context, v) for v in consts if v in stage.active},
            stacks,
            frozen,
        ),
        (jnp.arange(scan.length), xs, tape.residuals, d_ys),
        reverse=not scan.reverse,
    )
    d_inner = d_carry | d_consts | {v: _swap_if_batched(context, v, d) for v, d in d_xs.items()}
    d_inputs: Cotangents = {}
    for v, operand in zip(body.inputs, stage.operands):
        if v in d_inner:
            accumulate(d_inputs, {operand: _once(context, v, outer, operand, d_inner[v])})
    return Pulled(stacks.weights, stacks.own, statistics, d_inputs)


def _context(stage: LayerScan, outer: Context) -> Context:
    """The context of the body. The backward pass has all values again, except the carry and those computed from it."""
    body = stage.scan.body
    carry = body.inputs[stage.scan.num_consts : stage.scan.first_xs]
    again = {*body.constants, *body.inputs, *(v for equation in stage.invariant for v in equation.outputs)}
    return Context(body, stage.active, stage.batched, outer.microbatches, again.difference(carry))


def _operands(stage: LayerScan, outer: Context, context: Context, values: Mapping[int, Any]) -> _Operands:
    """The operands that are not from stacks. A microbatch axis, if any, comes after the layer axis."""
    scan = stage.scan
    from_stacks = {v for v, _ in stage.layers}
    operands = list(zip(scan.body.inputs, stage.operands))
    carry = operands[scan.num_consts : scan.first_xs]
    xs = [(v, as_floats(values[operand])) for v, operand in operands[scan.first_xs :] if v not in from_stacks]
    return _Operands(
        consts={v: as_floats(values[operand]) for v, operand in operands[: scan.num_consts]},
        carry={v: _for_each(context, v, outer, operand, as_floats(values[operand])) for v, operand in carry},
        xs={v: _swap_if_batched(context, v, x) for v, x in xs},
    )


def _invariant(stage: LayerScan, consts: Mapping[int, Any]) -> dict[int, Any]:
    """All values of the body that are the same in each iteration, by number."""
    values = {**stage.scan.body.constants, **consts}
    evaluate(stage.invariant, values)
    return values


def _of_outputs(stage: LayerScan, context: Context, d_carry: Cotangents, d_ys: Mapping[int, Any]) -> Cotangents:
    """Cotangents of the values that the body returns, given those of its outputs."""
    scan = stage.scan
    d: Cotangents = {}
    for p, v in enumerate(scan.body.outputs):
        received = scan.body.inputs[scan.num_consts + p] if p < scan.num_carry else v
        of_output = d_carry.get(received) if p < scan.num_carry else d_ys.get(p)
        if of_output is not None and v in stage.active:
            accumulate(d, {v: _once(context, received, context, v, of_output)})
    return d


def _for_each(context: Context, received: int, source: Context, value: int, x: Any) -> Any:
    """The value ``x``; repeated if it is the same for each microbatch but its receiver differs between them."""
    if received in context.batched and value not in source.batched:
        return jnp.broadcast_to(x, (context.microbatches, *x.shape))
    return x


def _once(context: Context, received: int, source: Context, value: int, d: Any) -> Any:
    """The cotangent of a value, summed over the microbatches for which the value was repeated."""
    if received in context.batched and value not in source.batched:
        return jnp.sum(d, axis=0, dtype=promoted(d.dtype, jnp.float32))
    return d


def _swap_if_batched(context: Context, v: int, x: Any) -> Any:
    """The value with its layer and microbatch axes swapped, if it has both."""
    return jnp.swapaxes(x, 0, 1) if v in context.batched else x
