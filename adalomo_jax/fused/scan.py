"""A scan over layers, run forward, and backward with each layer updated as soon as its gradient is there.

In the forward loop, too, the stacks are in the carry, behind a barrier: else XLA hoists a cast of them out of the loop,
for a copy of all the weights in the narrower dtype.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from adalomo_jax.fused import segment
from adalomo_jax.fused.cotangents import Cotangents, accumulate, pull
from adalomo_jax.fused.jaxpr import Program, evaluate, largest_made, reads_in_order
from adalomo_jax.fused.offload import fetch, put_on_host
from adalomo_jax.fused.plan import LayerScan
from adalomo_jax.fused.segment import Context, Layout, Residuals, sum_dtype, zero_sum, zeros
from adalomo_jax.fused.sharding import constrain
from adalomo_jax.fused.stacks import Part, barrier, layer_at, read_again, start, update_parts
from adalomo_jax.optimizers.precision import add, promoted


class Tape(NamedTuple):
    """What the backward loop needs of the forward one."""

    stacks: dict[int, Any]
    """By the number in the program."""
    residuals: list[Residuals]
    """Of each segment of the body, with a leading layer axis."""
    layouts: list[Layout]


class Pulled(NamedTuple):
    """What the backward loop leaves."""

    weights: list[Any]
    """The trained stacks."""
    own: list[Any]
    """The optimizer's state of them."""
    statistics: Any
    """Of each part of a layer, or of a layer where it is not updated; with a leading layer axis."""
    cotangents: Cotangents
    """Of the values that the scan reads."""


class _Operands(NamedTuple):
    """A scan's operands but for what comes from stacks, by the number in the body."""

    consts: dict[int, Any]
    carry: dict[int, Any]
    xs: dict[int, Any]
    """With the layer axis in front, before a microbatch axis."""


def forward(stage: LayerScan, outer: Context, values: dict[int, Any]) -> Tape:
    """Runs the scan on the program's ``values``, adds its results to them, and returns the tape."""
    scan, context = stage.scan, _context(stage, outer)
    consts, carry, xs = _operands(stage, outer, context, values)
    stacks = {stack.value: values[stack.value] for stack in stage.stacks}
    layouts: list[Layout] = []

    def iteration(carry_and_stacks, i_and_xs):
        (carry, stacks), (i, xs) = carry_and_stacks, i_and_xs
        layers, _ = _layers(stage, outer, _slices(stage, stacks, i))
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
      outer: of the program.
      tape: what `forward` returned.
      values: the program's values.
      cotangents: of the scan's outputs, where there are any.
      own: the optimizer state of the trained stacks, with a leading layer axis.
      parts: the optimizer's step on one layer of some trained stacks at a time; None leaves all as it is.
      measure: makes the statistics of a layer's gradients where it is not updated.
    """
    scan, body, context = stage.scan, stage.scan.body, _context(stage, outer)
    consts, carry, xs = _operands(stage, outer, context, values)
    d_outputs = {p: cotangents[v] for p, v in enumerate(stage.outputs) if v in cotangents}
    d_carry = {v: d_outputs.get(p, zeros(context, v)) for p, v in enumerate(carry) if v in stage.active}
    d_ys = {p: _swap_if_batched(context, body.outputs[p], d) for p, d in d_outputs.items() if p >= scan.num_carry}
    constants, axes = _invariant(stage, consts), [stack.axis for stack in stage.trained]
    first, stride = (0, 1) if scan.reverse else (scan.length - 1, -1)

    def iteration(state, x):
        d_carry, d_consts, stacks, frozen = state
        i, xs, residuals, d_ys = jax.tree.map(fetch, x)
        trained = dict(zip([stack.value for stack in stage.trained], stacks.weights))
        slices = _slices(stage, trained | frozen, i)
        layers, pull_chain = _layers(stage, outer, slices)
        there = constants | xs | layers
        d = _of_outputs(stage, context, d_carry, d_ys)
        for part, saved, layout in reversed(list(zip(stage.body, residuals, tape.layouts))):
            accumulate(d, segment.backward(part, context, (saved, layout), there, d))
        gradients = pull_chain(d)
        d_carry = {v: d.get(v, zeros(context, v)).astype(sum_dtype(context, v)) for v in d_carry}
        d_consts = {v: add(total, d[v]).astype(total.dtype) if v in d else total for v, total in d_consts.items()}
        d_xs = {v: d.get(v, zeros(context, v)) for v in xs if v in stage.active}
        if parts is None:
            stacks, statistics = barrier(stacks), measure(gradients)
        else:
            of_each = zip(stage.trained, stacks.weights, gradients, strict=True)
            read = read_again if len(parts) > 1 else lambda layer, stack, i, axis, gradient: jnp.squeeze(layer, axis)
            weights = [read(slices[s.value], x, i, s.axis, gradient) for s, x, gradient in of_each]
            read_by = (d_carry, d_consts, d_xs, gradients)
            stacks, statistics = update_parts(stacks, axes, i, i + stride, weights, gradients, parts, read_by)
        return (d_carry, d_consts, stacks, barrier(frozen)), (d_xs, statistics)

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


def update_order(stage: LayerScan, program: Program, one_by_one: bool) -> list[list[int]]:
    """The trained stacks, by their positions, in sets that are updated one after another.

    One by one, for stacks in host memory. In halves where a layer makes something large, as attention's scores are: the
    gradients of what it reads last are there first, and need not wait while those are alive; nor need the copies of
    weights that products have read (`read_again`). Else all together, and each weight is read for its update once.
    """
    reads = reads_in_order(stage.scan.body)
    of_value = {value: reads.index(v) for v, value in stage.layers if v in reads}
    for equation in reversed(stage.chain):
        of_value |= {v: of_value.get(equation.outputs[0], 0) for v in equation.inputs if v not in of_value}
    order = sorted(range(len(stage.trained)), key=lambda k: -of_value.get(stage.trained[k].value, 0))
    if one_by_one:
        return [[k] for k in order]
    avals = [program.avals[stack.value] for stack in stage.trained]
    sizes = [aval.size * aval.dtype.itemsize for aval in avals]
    if 2 * largest_made(stage.scan.body) * stage.scan.length < sum(sizes):
        return [sorted(order)]
    before = [sum(sizes[k] for k in order[:n]) for n in range(len(order))]
    first = [k for k, size in zip(order, before) if 2 * size < sum(sizes)]
    return [half for half in (sorted(first), sorted(set(order) - set(first))) if half]


def _context(stage: LayerScan, outer: Context) -> Context:
    """Of the body. All but the carry, and what is computed from it, is there again on the way back."""
    body = stage.scan.body
    carry = body.inputs[stage.scan.num_consts : stage.scan.first_xs]
    again = {*body.constants, *body.inputs, *(v for equation in stage.invariant for v in equation.outputs)}
    return Context(body, stage.active, stage.batched, outer.microbatches, again.difference(carry))


def _operands(stage: LayerScan, outer: Context, context: Context, values: Mapping[int, Any]) -> _Operands:
    """What is not of stacks. What differs between microbatches has their axis after that of the layers."""
    scan = stage.scan
    from_stacks = {v for v, _ in stage.layers}
    operands = list(zip(scan.body.inputs, stage.operands))
    carry = operands[scan.num_consts : scan.first_xs]
    xs = [(v, values[operand]) for v, operand in operands[scan.first_xs :] if v not in from_stacks]
    return _Operands(
        consts={v: values[operand] for v, operand in operands[: scan.num_consts]},
        carry={v: _for_each(context, v, outer, operand, values[operand]) for v, operand in carry},
        xs={v: _swap_if_batched(context, v, x) for v, x in xs},
    )


def _invariant(stage: LayerScan, consts: Mapping[int, Any]) -> dict[int, Any]:
    """All values of the body that are the same in each iteration, by number."""
    values = {**stage.scan.body.constants, **consts}
    evaluate(stage.invariant, values)
    return values


def _slices(stage: LayerScan, stacks: Mapping[int, Any], i: Any) -> dict[int, Any]:
    """Layer ``i`` of each stack, its layer axis kept, by the number in the program."""
    layers = {s.value: layer_at(stacks[s.value], i, s.axis, keepdims=True) for s in stage.stacks}
    return {stack.value: constrain(layers[stack.value], stack.sharding) for stack in stage.stacks}


def _layers(
    stage: LayerScan, outer: Context, slices: Mapping[int, Any]
) -> tuple[dict[int, Any], Callable[[Cotangents], list[Any]]]:
    """What the body receives of one layer, and the pullback of cotangents of that to gradients of the layer."""
    made = {v for equation in stage.chain for v in equation.outputs}.intersection(v for _, v in stage.layers)

    def run(trained: dict[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
        values = {**outer.program.constants, **slices, **trained}
        evaluate(stage.chain, values)
        active = {v: values[v] for v in made if v in outer.active}
        return active, {v: values[v] for v in made if v not in active}

    trained = {stack.value: slices[stack.value] for stack in stage.trained}
    active, pullback, passive = jax.vjp(run, trained, has_aux=True)
    there = {**slices, **active, **passive}

    def pull_chain(d: Cotangents) -> list[Any]:
        found: Cotangents = {}
        for v, value in stage.layers:
            if v in d and value in outer.active:
                accumulate(found, {value: d[v][None]})
        if any(v in found for v in active):
            d_made = {v: found[v] if v in found else jnp.zeros_like(x) for v, x in active.items()}
            accumulate(found, pull(pullback, d_made, {v: x.dtype for v, x in active.items()}))
        gradients = [found.get(stack.value, jnp.zeros_like(slices[stack.value])) for stack in stage.trained]
        return [jnp.squeeze(g, stack.axis) for g, stack in zip(gradients, stage.trained)]

    return {v: jnp.squeeze(there[value], 0) for v, value in stage.layers}, pull_chain


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
    """A value that is the same for each microbatch, repeated where what receives it differs."""
    if received in context.batched and value not in source.batched:
        return jnp.broadcast_to(x, (context.microbatches, *x.shape))
    return x


def _once(context: Context, received: int, source: Context, value: int, d: Any) -> Any:
    """The cotangent of a value, summed over the microbatches that it was repeated for."""
    if received in context.batched and value not in source.batched:
        return jnp.sum(d, axis=0, dtype=promoted(d.dtype, jnp.float32))
    return d


def _swap_if_batched(context: Context, v: int, x: Any) -> Any:
    """The axes of layers and of microbatches swapped, where there are both."""
    return jnp.swapaxes(x, 0, 1) if v in context.batched else x
