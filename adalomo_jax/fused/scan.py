"""A scan over layers, run forward, and backward with each layer updated as soon as its gradient is there.

In the forward loop, too, the stacks are in the carry, behind a barrier: else XLA hoists a cast of them out of the loop,
for a copy of all the weights in the narrower dtype.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from adalomo_jax.fused.jaxpr import evaluate
from adalomo_jax.fused.plan import LayerScan
from adalomo_jax.fused.stacks import Stacks, UpdateLayer, layer_at, start, update


class Source(NamedTuple):
    """Where a residual is to be had on the way back."""

    kind: str
    """``"input"``: an input of the body, ``"saved"``: what the forward loop saved, ``"constant"``: it is known."""
    key: Any
    """The number of the input, the position among what is saved, or the constant."""


class Tape(NamedTuple):
    """What the backward loop needs of the forward one."""

    stacks: list[Any]
    saved: list[Any]
    """Residuals of every iteration, with a leading layer axis, without those that are inputs of the body."""
    treedef: Any
    """Of the pullback of one iteration, whose leaves are its residuals."""
    sources: list[Source]


def forward(stage: LayerScan, values: dict[int, Any]) -> Tape:
    """Runs the scan on the program's ``values``, adds its results to them, and returns the tape."""
    scan = stage.scan
    consts, carry, xs = _operands(stage, values)
    stacks = [values[stack.value] for stack in stage.stacks]
    layout: list[tuple[Any, list[Source]]] = []

    def iteration(carry_and_stacks, i_and_xs):
        (carry, stacks), (i, xs) = carry_and_stacks, i_and_xs
        again = _invariant(stage, consts) | xs | _layers(stage, stacks, i)
        outputs, pullback = _body_vjp(stage, again | carry)
        saved, treedef, sources = _take_apart(pullback, again)
        layout.append((treedef, sources))
        new_carry = dict(zip(carry, outputs))
        return (new_carry, lax.optimization_barrier(stacks)), ([outputs[p] for p in stage.read_ys], saved)

    (carry, stacks), (ys, saved) = lax.scan(
        iteration, (carry, stacks), (jnp.arange(scan.length), xs), reverse=scan.reverse, unroll=scan.unroll
    )
    values.update(zip(stage.outputs, carry.values()))
    values.update(zip([stage.outputs[p] for p in stage.read_ys], ys))
    return Tape(stacks, saved, *layout[-1])


def backward(
    stage: LayerScan,
    tape: Tape,
    values: Mapping[int, Any],
    cotangents: Mapping[int, Any],
    own: list[Any],
    update_layer: UpdateLayer,
) -> tuple[Stacks, list[tuple[int, Any]]]:
    """Pulls the scan back layer by layer, updating each layer with the gradient taken at its old weights.

    Args:
      stage: the scan.
      tape: what `forward` returned.
      values: the program's values.
      cotangents: of the scan's outputs, where there are any.
      own: the optimizer state of the stacks, with a leading layer axis.
      update_layer: the optimizer's step on one layer.

    Returns:
      The updated stacks, and pairs of a value that the scan reads and a cotangent of it.
    """
    scan, body = stage.scan, stage.scan.body
    consts, carry, xs = _operands(stage, values)
    d_outputs = {p: cotangents[v] for p, v in enumerate(stage.outputs) if v in cotangents}
    d_carry = {v: d_outputs.get(p, body.zeros(v)) for p, v in enumerate(carry) if v in stage.active}
    d_consts = {v: body.zeros(v) for v in consts if v in stage.active}
    constants = _invariant(stage, consts)
    d_ys = {p: d for p, d in d_outputs.items() if p >= scan.num_carry}
    first, stride = (0, 1) if scan.reverse else (scan.length - 1, -1)

    def iteration(state, x):
        d_carry, d_consts, stacks = state
        i, xs, saved, d_ys = x
        layers = _layers(stage, stacks.weights, i)
        pullback = _put_together(tape, constants | xs | layers, saved)
        d_of_outputs = {p: d_carry[v] for p, v in enumerate(carry) if v in d_carry} | d_ys
        (d,) = pullback(
            {p: d_of_outputs.get(p, body.zeros(v)) for p, v in enumerate(body.outputs) if v in stage.active}
        )
        weights = [layers[stack.body_inputs[0]] for stack in stage.stacks]
        gradients = [_sum(d[v] for v in stack.body_inputs) for stack in stage.stacks]
        stacks = update(stacks, i, i + stride, weights, gradients, update_layer, read_by=d)
        d_consts = {v: d_consts[v] + d[v] for v in d_consts}
        return ({v: d[v] for v in d_carry}, d_consts, stacks), {v: d[v] for v in xs if v in stage.active}

    (d_carry, d_consts, stacks), d_xs = lax.scan(
        iteration,
        (d_carry, d_consts, start(tape.stacks, own, first, update_layer)),
        (jnp.arange(scan.length), xs, tape.saved, d_ys),
        reverse=not scan.reverse,
        unroll=scan.unroll,
    )
    d_inputs = d_carry | d_consts | d_xs
    return stacks, [(outer, d_inputs[v]) for v, outer in zip(body.inputs, stage.inputs) if v in d_inputs]


def _operands(stage: LayerScan, values: Mapping[int, Any]) -> tuple[dict[int, Any], dict[int, Any], dict[int, Any]]:
    """The scan's constants, initial carry and scanned inputs but for the stacks, by the number in the body."""
    scan = stage.scan
    of_stacks = {v for stack in stage.stacks for v in stack.body_inputs}
    operands = [(v, values[outer]) for v, outer in zip(scan.body.inputs, stage.inputs)]
    xs = [(v, x) for v, x in operands[scan.first_xs :] if v not in of_stacks]
    return dict(operands[: scan.num_consts]), dict(operands[scan.num_consts : scan.first_xs]), dict(xs)


def _invariant(stage: LayerScan, consts: Mapping[int, Any]) -> dict[int, Any]:
    """All values of the body that are the same in each iteration, by number."""
    values = {**stage.scan.body.constants, **consts}
    evaluate(stage.invariant, values)
    return values


def _layers(stage: LayerScan, stacks: Sequence[Any], i: Any) -> dict[int, Any]:
    """Layer ``i`` of each stack, by the number in the body."""
    layers = [(stack, layer_at(x, i)) for stack, x in zip(stage.stacks, stacks)]
    return {v: layer for stack, layer in layers for v in stack.body_inputs}


def _body_vjp(stage: LayerScan, inputs: Mapping[int, Any]) -> tuple[list[Any], Any]:
    """The body's outputs, and its pullback: cotangents of active outputs by position, to those of inputs by number.

    ``inputs`` are the invariant values too.
    """
    outputs = list(enumerate(stage.scan.body.outputs))

    def run(active_inputs: dict[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
        values = dict(inputs) | active_inputs
        evaluate(stage.varying, values)
        active = {p: values[v] for p, v in outputs if v in stage.active}
        return active, {p: values[v] for p, v in outputs if p not in active}

    active_inputs = {v: inputs[v] for v in stage.scan.body.inputs if v in stage.active}
    active, pullback, passive = jax.vjp(run, active_inputs, has_aux=True)
    return [active[p] if p in active else passive[p] for p, _ in outputs], pullback


def _take_apart(pullback: Any, again: Mapping[int, Any]) -> tuple[list[Any], Any, list[Source]]:
    """The residuals to save, the pullback's structure, and where each residual is to be had on the way back.

    A residual that *is* an input of the body is not saved: JAX keeps the very value that the body received.
    """
    residuals, treedef = jax.tree.flatten(pullback)
    inputs = {id(x): v for v, x in again.items()}
    saved: dict[int, Any] = {}
    sources = []
    for x in residuals:
        if id(x) in inputs:
            sources.append(Source("input", inputs[id(x)]))
        elif isinstance(x, Tracer):
            saved.setdefault(id(x), x)
            sources.append(Source("saved", list(saved).index(id(x))))
        else:
            sources.append(Source("constant", x))
    return list(saved.values()), treedef, sources


def _put_together(tape: Tape, again: Mapping[int, Any], saved: Sequence[Any]) -> Any:
    """The pullback of one iteration."""
    find = {"input": again.__getitem__, "saved": saved.__getitem__, "constant": lambda x: x}
    return jax.tree.unflatten(tape.treedef, [find[kind](key) for kind, key in tape.sources])


def _sum(terms: Iterable[Any]) -> Any:
    first, *rest = terms
    return sum(rest, start=first)
