"""Which values of a program depend on trained parameters, and which differ between microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from adalomo_jax.fused.plan.jaxpr import Equation, Program, Scan, scan_of


def active_values(program: Program, inputs: Iterable[int]) -> set[int]:
    """The differentiable values that depend on some inputs with no ``stop_gradient`` in between."""
    return _dependent(program, inputs, _ACTIVITY)


def active_in_scan(scan: Scan, operands: Sequence[bool]) -> set[int]:
    """The active values of a scan's body, given the active operands, once activity has gone around the carry."""
    return _dependent_in_scan(scan, operands, _ACTIVITY)


def batched_values(program: Program, inputs: Iterable[int], scans: Iterable[Equation] = ()) -> set[int]:
    """All values that differ between microbatches, given the inputs that do.

    The outputs of an equation differ all together, or not at all, except for ``scans``: their outputs are told apart.
    Two things are done for each microbatch in any case: effects, and broadcasts in a narrow dtype. Pulled back, such
    broadcasts are sums, each rounded, of the cotangents of one microbatch, and not of the sum over all microbatches.
    """
    ids = {id(scan) for scan in scans}
    return _dependent(program, inputs, _BATCHING._replace(tells_apart=lambda equation: id(equation) in ids))


def batched_in_scan(scan: Scan, operands: Sequence[bool]) -> set[int]:
    """The values of a scan's body that differ, given the operands that do, once this has gone around the carry."""
    return _dependent_in_scan(scan, operands, _BATCHING)


def is_differentiable(aval: Any) -> bool:
    """Whether values of this type have cotangents of their own type."""
    return jnp.issubdtype(aval.dtype, jnp.inexact)


class _Rule(NamedTuple):
    """How one value's dependence makes others dependent."""

    counts: Callable[[Any], bool]
    """Whether values of a type can be dependent."""
    tells_apart: Callable[[Equation], bool]
    """Whether an equation is a scan whose outputs are told apart."""
    passes: Callable[[Equation, bool], bool]
    """Whether an equation's outputs are dependent, given whether any of its inputs is."""


_ACTIVITY = _Rule(is_differentiable, lambda e: e.name == "scan", lambda e, reads: reads and e.name != "stop_gradient")
_BATCHING = _Rule(lambda aval: True, lambda e: False, lambda e, reads: reads or e.has_effects or _repeats_narrow(e))


def _repeats_narrow(equation: Equation) -> bool:
    """Whether the equation repeats a value, other than a literal, that has fewer digits than a float32."""
    if equation.name != "broadcast_in_dim" or equation.reads_literal(0):
        return False
    aval: Any = equation.source.outvars[0].aval
    return jnp.issubdtype(aval.dtype, jnp.floating) and jnp.finfo(aval.dtype).nmant < jnp.finfo(jnp.float32).nmant


def _dependent(program: Program, inputs: Iterable[int], rule: _Rule) -> set[int]:
    """The values that depend on some inputs through values that count."""
    found = {v for v in inputs if rule.counts(program.avals[v])}
    for equation in program.equations:
        flags = _dependent_outputs(equation, [v in found for v in equation.inputs], rule)
        found |= {v for v, flag in zip(equation.outputs, flags) if flag and rule.counts(program.avals[v])}
    return found


def _dependent_in_scan(scan: Scan, operands: Sequence[bool], rule: _Rule) -> set[int]:
    inputs, outputs = scan.body.inputs, scan.body.outputs
    found = {v for v, flag in zip(inputs, operands) if flag}
    while True:
        values = _dependent(scan.body, found, rule)
        fed_back = {inputs[scan.num_consts + i] for i, v in enumerate(outputs[: scan.num_carry]) if v in values}
        if fed_back <= found:
            return values
        found |= fed_back


def _dependent_outputs(equation: Equation, operands: Sequence[bool], rule: _Rule) -> list[bool]:
    is_dependent = rule.passes(equation, any(operands))
    if is_dependent and rule.tells_apart(equation):
        scan = scan_of(equation)
        found = _dependent_in_scan(scan, operands, rule)
        carry = scan.body.inputs[scan.num_consts : scan.first_xs]
        outputs = scan.body.outputs
        return [v in found for v in carry] + [v in found for v in outputs[scan.num_carry :]]
    return [is_dependent] * len(equation.outputs)
