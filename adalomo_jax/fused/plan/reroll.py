"""Rolls layers that a Python loop left side by side in a program back up, into a scan over their stacks."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adalomo_jax.fused.plan.jaxpr import Equation, Program, evaluate, retrace
from adalomo_jax.fused.plan.order import Ordered, picks_layers
from adalomo_jax.fused.plan.repeats import Found, Repeat, Scanned, find_repeats
from adalomo_jax.fused.plan.saving import evaluate_layer


def reroll(program: Program, leaves: Sequence[int]) -> Program:
    """Puts a scan in place of the equations that repeat over layers of stacks. The program computes the same.

    Args:
      program: a loss that reads single layers of stacks, each at a known index.
      leaves: the parameters, which are its first inputs.
    """
    if not picks_layers(program, leaves):
        return program
    found = find_repeats(program, leaves, [None] * len(leaves))
    if not found.repeats:
        return program
    return retrace(found.program, lambda values: _run(found, values), len(leaves))


def _run(found: Found, values: dict[int, Any]) -> list[Any]:
    equations = found.ordered.equations
    evaluate(found.ordered.first, values)
    at = 0
    for repeat in found.repeats:
        evaluate(equations[at : repeat.start], values)
        _scan(found, repeat, values)
        at = repeat.stop
    evaluate(equations[at:], values)
    return [values[v] for v in found.program.outputs]


def _scan(found: Found, repeat: Repeat, values: dict[int, Any]) -> None:
    """Runs a scan in place of a run, and adds its results that are read later to the values."""
    program, ordered = found.program, found.ordered
    handed_on = {c.made: c.received for c in repeat.carried}
    last = {r.value: handed_on[r.made] for r in repeat.read if r.layer == repeat.layers - 1 and r.made in handed_on}
    stacked = list(dict.fromkeys(r.made for r in repeat.read if r.value not in last))
    shared = {*found.layers.leaves, *ordered.of_leaves}
    same, others = _split_same(repeat, shared)
    parameters = {*shared, *program.constants, *(s.received for s in repeat.scanned if s.is_parameter)}

    def body(carry: dict[int, Any], xs: dict[int, Any]) -> tuple[dict[int, Any], list[Any]]:
        inner = dict(values)
        evaluate(same, inner)
        inner |= carry | xs
        evaluate_layer(program, repeat, others, parameters, inner, stacked)
        return {c.received: _strong(inner[c.made]) for c in repeat.carried}, [inner[v] for v in stacked]

    carry = {c.received: _strong(values[c.initial]) for c in repeat.carried}
    xs = {scanned.received: _stack(program, ordered, scanned, values) for scanned in repeat.scanned}
    carry, ys = lax.scan(body, carry, xs, length=repeat.layers)
    values.update((v, carry[received]) for v, received in last.items())
    for r in repeat.read:
        if r.value not in last:
            values[r.value] = lax.index_in_dim(ys[stacked.index(r.made)], r.layer, 0, keepdims=False)


def _split_same(repeat: Repeat, of_leaves: Collection[int]) -> tuple[list[Equation], list[Equation]]:
    """Splits a layer's equations: those that compute the same in each layer, and the others.

    Equations that read parameters count among the others. Outside the layers, each layer would save their results: say,
    a shared matrix's transpose, although the matrix itself is available again.
    """
    varies = {received.received for received in (*repeat.carried, *repeat.scanned)}.union(of_leaves)
    same, others = [], []
    for equation in repeat.layer:
        if varies.isdisjoint(equation.inputs) and not equation.has_effects:
            same.append(equation)
        else:
            varies.update(equation.outputs)
            others.append(equation)
    return same, others


def _stack(program: Program, ordered: Ordered, scanned: Scanned, values: Mapping[int, Any]) -> Any:
    """Stacks one value for each layer along a first axis; if they are the layers of an array, takes that array."""
    picks = [ordered.picks.get(v) for v in scanned.values]
    if picks[0] is not None and picks == [picks[0]._replace(index=i) for i in range(len(picks))]:
        source = values[picks[0].source]
        if source.shape[picks[0].axis] == len(picks):
            return jnp.moveaxis(source, picks[0].axis, 0)
    if all(v in program.constants for v in scanned.values) and not program.avals[scanned.values[0]].ndim:
        return np.stack([np.asarray(program.constants[v], program.avals[v].dtype) for v in scanned.values])
    return jnp.stack([values[v] for v in scanned.values])


def _strong(x: Any) -> Any:
    """The array, with a dtype that is not weak."""
    x = jnp.asarray(x)
    return lax.convert_element_type(x, x.dtype) if jax.typeof(x).weak_type else x
