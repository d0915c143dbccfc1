"""A scan over layers, run forward, and backward with each layer updated as soon as its gradient is there.

The stacks of parameters and optimizer state are in the carry of the backward loop, read and written at one layer's
index: only so does XLA update them in place. In the forward loop they are in the carry behind a barrier, or XLA hoists
a cast of them out of the loop, for a copy of all the weights in the narrower dtype.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from adalomo_jax.fused.jaxpr import Program, evaluate
from adalomo_jax.fused.plan import LayerScan

UpdateLayer = Callable[[jax.Array, list[Any], list[Any], list[Any]], tuple[list[Any], list[Any], Any]]
"""``(i, weights, gradients, state) -> (weights, state, statistics)`` of layer ``i`` of each stack."""


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


class LayerScanResult(NamedTuple):
    """What a scan's backward loop leaves."""

    stacks: list[Any]
    own: list[Any]
    """The optimizer state of the stacks."""
    statistics: Any
    """The sum over the layers."""
    cotangents: list[tuple[int, Any]]
    """Pairs of a value that the scan reads and a cotangent of it; a value may be there more than once."""


def forward(stage: LayerScan, values: dict[int, Any]) -> Tape:
    """Runs the scan on the program's ``values``, adds its results to them, and returns the tape."""
    scan = stage.scan
    consts, carry, xs = _operands(stage, values)
    stacks = [values[stack.value] for stack in stage.stacks]
    layout: list[tuple[Any, list[Source]]] = []

    def iteration(carry_and_stacks, i_and_xs):
        (carry, stacks), (i, xs) = carry_and_stacks, i_and_xs
        again = consts | xs | _layers(stage, stacks, i)
        outputs, pullback = _body_vjp(scan.body, again | carry, stage.active)
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
) -> LayerScanResult:
    """Pulls the scan back layer by layer, updating each layer with the gradient taken at its old weights.

    Args:
      stage: the scan.
      tape: what `forward` returned.
      values: the program's values.
      cotangents: of the scan's outputs, where there are any.
      own: the optimizer state of the stacks, with a leading layer axis.
      update_layer: the optimizer's step on one layer.
    """
    scan, body = stage.scan, stage.scan.body
    consts, carry, xs = _operands(stage, values)
    carry_inputs = list(carry)
    active_outputs = [p for p, v in enumerate(body.outputs) if v in stage.active]
    d_carry = {
        v: cotangents[outer] if outer in cotangents else _zeros(body, v)
        for v, outer in zip(carry, stage.outputs)
        if v in stage.active
    }
    d_ys = {
        p: cotangents[stage.outputs[p]]
        for p in active_outputs
        if p >= scan.num_carry and stage.outputs[p] in cotangents
    }

    def iteration(state, x):
        d_carry, d_consts, stacks, own, own_layer, statistics = state
        i, xs, saved, d_ys = x
        layers = _layers(stage, stacks, i)
        pullback = _put_together(tape, consts | xs | layers, saved)
        d_outputs = {p: d_carry[carry_inputs[p]] for p in active_outputs if p < scan.num_carry} | d_ys
        (d,) = pullback({p: d_outputs[p] if p in d_outputs else _zeros(body, body.outputs[p]) for p in active_outputs})
        gradients = [_sum(d[v] for v in stack.body_inputs) for stack in stage.stacks]
        weights = [layers[stack.body_inputs[0]] for stack in stage.stacks]
        weights, own_layer, new_statistics = update_layer(i, weights, gradients, own_layer)
        own = [_write(o, layer, i) for o, layer in zip(own, own_layer)]
        i_when_read = _after(i, d)
        state = (
            {v: d[v] for v in d_carry},
            {v: d_consts[v] + d[v] for v in d_consts},
            [_write(stack, layer, i_when_read) for stack, layer in zip(stacks, weights)],
            own,
            [_at(o, jnp.clip(i + stride, 0, scan.length - 1)) for o in own],
            jax.tree.map(jnp.add, statistics, new_statistics),
        )
        return state, {v: d[v] for v in xs if v in stage.active}

    d_consts = {v: _zeros(body, v) for v in consts if v in stage.active}
    # The state of the next layer is read after this one's is written, and carried: an update that reads the stack while
    # it is written costs a copy of the stack.
    first, stride = (0, 1) if scan.reverse else (scan.length - 1, -1)
    own_layer = [_at(o, first) for o in own]
    statistics = _zero_statistics(stage, update_layer, own_layer)
    (d_carry, d_consts, stacks, own, _, statistics), d_xs = lax.scan(
        iteration,
        (d_carry, d_consts, tape.stacks, own, own_layer, statistics),
        (jnp.arange(scan.length), xs, tape.saved, d_ys),
        reverse=not scan.reverse,
        unroll=scan.unroll,
    )
    d_inputs = d_carry | d_consts | d_xs
    pairs = [(outer, d_inputs[v]) for v, outer in zip(body.inputs, stage.inputs) if v in d_inputs]
    return LayerScanResult(stacks, own, statistics, pairs)


def _operands(stage: LayerScan, values: Mapping[int, Any]) -> tuple[dict[int, Any], dict[int, Any], dict[int, Any]]:
    """The scan's constants, initial carry and scanned inputs but for the stacks, by the number in the body."""
    scan = stage.scan
    of_stacks = {v for stack in stage.stacks for v in stack.body_inputs}
    operands = [(v, values[outer]) for v, outer in zip(scan.body.inputs, stage.inputs)]
    xs = [(v, x) for v, x in operands[scan.first_xs :] if v not in of_stacks]
    return dict(operands[: scan.num_consts]), dict(operands[scan.num_consts : scan.first_xs]), dict(xs)


def _layers(stage: LayerScan, stacks: Sequence[Any], i: Any) -> dict[int, Any]:
    """Layer ``i`` of each stack, by the number in the body."""
    layers = [(stack, _at(x, i)) for stack, x in zip(stage.stacks, stacks)]
    return {v: layer for stack, layer in layers for v in stack.body_inputs}


def _body_vjp(body: Program, inputs: Mapping[int, Any], active: frozenset[int]) -> tuple[list[Any], Any]:
    """The body's outputs, and its pullback: cotangents of active outputs by position, to those of inputs by number."""

    def run(active_inputs: dict[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
        values = dict(body.constants) | dict(inputs) | active_inputs
        evaluate(body.equations, values)
        outputs = list(enumerate(body.outputs))
        return {p: values[v] for p, v in outputs if v in active}, {p: values[v] for p, v in outputs if v not in active}

    differentiated = {v: x for v, x in inputs.items() if v in active}
    outputs, pullback, passive = jax.vjp(run, differentiated, has_aux=True)
    outputs = outputs | passive
    return [outputs[p] for p in range(len(body.outputs))], pullback


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


def _zero_statistics(stage: LayerScan, update_layer: UpdateLayer, own: list[Any]) -> Any:
    """Zeros like what `update_layer` returns last."""
    layers = [_zeros(stage.scan.body, stack.body_inputs[0]) for stack in stage.stacks]
    shapes = jax.eval_shape(lambda o: update_layer(jnp.zeros([], jnp.int32), layers, layers, o)[2], own)
    return jax.tree.map(jnp.zeros_like, shapes)


def _zeros(program: Program, v: int) -> jax.Array:
    return jnp.zeros(program.avals[v].shape, program.avals[v].dtype)


def _sum(terms: Iterable[Any]) -> Any:
    first, *rest = terms
    return sum(rest, start=first)


def _after(i: Any, computed: Any) -> Any:
    """``i``, in a way that XLA cannot have before all of ``computed``."""
    for x in jax.tree.leaves(computed):
        bits = lax.bitcast_convert_type(jnp.real(x).ravel()[:1].astype(jnp.float32), jnp.int32)
        i = i + jnp.sum(lax.shift_right_logical(lax.shift_right_logical(bits, 31), 1))
    return i


def _at(stack: Any, i: Any) -> Any:
    return lax.dynamic_index_in_dim(stack, i, keepdims=False)


def _write(stack: Any, layer: Any, i: Any) -> Any:
    return lax.dynamic_update_index_in_dim(stack, layer, i, 0)
