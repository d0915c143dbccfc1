"""One layer of the stacks that a scan runs over: what the body receives of it, and the order of its updates."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from adalomo_jax.barriers import in_order
from adalomo_jax.fused.offload import is_on_host
from adalomo_jax.fused.plan.contents import largest_made, reads_in_order
from adalomo_jax.fused.plan.jaxpr import Program, evaluate
from adalomo_jax.fused.plan.plan import LayerScan
from adalomo_jax.fused.run.cotangents import Cotangents, accumulate, pull
from adalomo_jax.fused.run.in_place import layer_at
from adalomo_jax.fused.run.segment import Context
from adalomo_jax.fused.sharding import constrain
from adalomo_jax.optimizers.kept import is_kept


def update_order(stage: LayerScan, program: Program, one_by_one: bool) -> list[list[int]]:
    """The trained stacks, by their positions, in sets that are updated one after another.

    Stacks in host memory are updated one by one, others together with those of the same home (`LayerScan.homes`): in
    two halves if a segment makes something large, such as attention scores. The gradients of the stacks that it reads
    last are complete first, and need not wait while the large values are alive; nor need the copies of weights that
    products read (`in_place.read_again`). Otherwise all are updated together, and each weight is read once for that.
    """
    reads = reads_in_order(stage.scan.body)
    of_value = {value: reads.index(v) for v, value in stage.layers if v in reads}
    for equation in reversed(stage.chain):
        of_value |= {v: of_value.get(equation.outputs[0], 0) for v in equation.inputs if v not in of_value}
    order = sorted(range(len(stage.trained)), key=lambda k: -of_value.get(stage.trained[k].value, 0))
    if one_by_one:
        return [[k] for k in order]
    sets = list[list[int]]()
    for s in reversed(range(len(stage.body))):
        at_home = [k for k in order if stage.homes[stage.trained[k].value] == s]
        sets += _in_halves(stage, program, s, at_home)
    return sets


def _in_halves(stage: LayerScan, program: Program, segment: int, order: list[int]) -> list[list[int]]:
    """One set of the stacks of one home, or two if the segment makes something larger than half of a layer of them."""
    avals = {k: program.avals[stage.trained[k].value] for k in order}
    sizes = [aval.size * aval.dtype.itemsize for aval in avals.values()]
    if 2 * largest_made(stage.body[segment].equations) * stage.scan.length < sum(sizes):
        return [sorted(order)] if order else []
    before = [sum(sizes[:n]) for n in range(len(order))]
    first = [k for k, size in zip(order, before) if 2 * size < sum(sizes)]
    return [half for half in (sorted(first), sorted(set(order) - set(first))) if half]


def slices_at(stage: LayerScan, stacks: Mapping[int, Any], i: Any, read: Collection[int]) -> dict[int, Any]:
    """The floats of layer ``i`` of each stack that is read, with the layer axis, by the stack's number."""
    of_each = [stack for stack in stage.stacks if stack.value in read]
    layers = {s.value: _floats_at(stacks[s.value], i, s.axis) for s in of_each}
    return {stack.value: constrain(layers[stack.value], stack.sharding) for stack in of_each}


def received(
    stage: LayerScan, outer: Context, slices: Mapping[int, Any]
) -> tuple[dict[int, Any], Callable[[Cotangents], dict[int, Any]]]:
    """What the body receives of one layer of some stacks, by its inputs; and the pullback of their cotangents.

    The pullback gives the gradient of the layer of each trained stack among them, by the stack's number in the program.
    """
    there = {value for value, stacks in stage.made_of.items() if stacks <= slices.keys()}
    chain = [equation for equation in stage.chain if there.issuperset(equation.outputs)]
    layers = [(v, value) for v, value in stage.layers if value in there]
    made = {v for equation in chain for v in equation.outputs}.intersection(v for _, v in layers)

    def run(trained: dict[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
        values = {**outer.program.constants, **slices, **trained}
        evaluate(chain, values)
        active = {v: values[v] for v in made if v in outer.active}
        return active, {v: values[v] for v in made if v not in active}

    trained = [stack for stack in stage.trained if stack.value in slices]
    active, pullback, passive = jax.vjp(run, {stack.value: slices[stack.value] for stack in trained}, has_aux=True)
    values = {**slices, **active, **passive}

    def pull_chain(d: Cotangents) -> dict[int, Any]:
        found: Cotangents = {}
        for v, value in layers:
            if v in d and value in outer.active:
                accumulate(found, {value: d[v][None]})
        if any(v in found for v in active):
            d_made = {v: found[v] if v in found else jnp.zeros_like(x) for v, x in active.items()}
            accumulate(found, pull(pullback, d_made, {v: x.dtype for v, x in active.items()}))
        gradients = {s.value: found.get(s.value, jnp.zeros_like(slices[s.value])) for s in trained}
        return {stack.value: jnp.squeeze(gradients[stack.value], stack.axis) for stack in trained}

    return {v: jnp.squeeze(values[value], 0) for v, value in layers}, pull_chain


def _floats_at(stack: Any, i: Any, axis: int) -> Any:
    if not is_kept(stack):
        return layer_at(stack, i, axis, keepdims=True)
    floats = layer_at(stack, i, axis).floats() if is_on_host(stack) else stack.layer_floats(i, axis)
    # Decoded with its layer axis, it would be written out: a TPU's compiler would not fuse that into the products.
    return jnp.expand_dims(in_order(floats), axis)
