"""What programs contain: primitives, reads and values, also those within calls, branches and loops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from adalomo_jax.fused.plan.jaxpr import Equation, Program, scan_of
from adalomo_jax.jax_versions import called, is_jaxpr, is_literal, is_reference, open_jaxpr

if TYPE_CHECKING:
    from adalomo_jax.jax_versions import JaxprEqn


def primitives_of(equations: Iterable[Equation]) -> set[str]:
    """The names of the primitives, including those within calls, branches and loops."""
    return set().union(*(_primitives(equation.source) for equation in equations))


def largest_made(equations: Sequence[Equation]) -> int:
    """The bytes of the largest value that an equation makes, including those within calls, branches and loops."""
    return max((_largest(equation.source) for equation in equations), default=0)


def has_programs(equation: Equation) -> bool:
    """Whether an equation runs others."""
    return bool(_inner(equation.source))


def reads_in_order(program: Program) -> list[int]:
    """The inputs in the order in which the equations first read them, including those within calls and checkpoints."""
    reads: list[int] = []
    for equation in program.equations:
        pairs = zip(equation.source.invars, equation.inputs)
        reads += _reads(equation.source, {var: v for var, v in pairs if not is_literal(var)})
    return [v for v in dict.fromkeys(reads) if v in program.inputs]


def reads_references(program: Program) -> bool:
    """Whether it, or a scan in it, changes arrays in place (``jax.new_ref``), which hides what depends on what."""
    return any(map(is_reference, program.avals)) or any(
        reads_references(scan_of(equation).body) for equation in program.equations if equation.name == "scan"
    )


def _primitives(eqn: JaxprEqn) -> set[str]:
    return {eqn.primitive.name}.union(*(_primitives(e) for jaxpr in _inner(eqn) for e in open_jaxpr(jaxpr).eqns))


def _largest(eqn: JaxprEqn) -> int:
    size: Any = lambda aval: getattr(aval, "size", 0) * getattr(getattr(aval, "dtype", None), "itemsize", 1)
    made = [size(var.aval) for var in eqn.outvars]
    return max([*made, *(_largest(e) for jaxpr in _inner(eqn) for e in open_jaxpr(jaxpr).eqns)], default=0)


def _inner(eqn: JaxprEqn) -> list[Any]:
    """The jaxprs that an equation runs: its body, branches or derivatives."""
    return [x for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr) if is_jaxpr(x)]


def _reads(eqn: JaxprEqn, numbers: Mapping[Any, int]) -> list[int]:
    """The numbered variables in the order in which an equation, or an equation that it calls, reads them."""
    known = [None if is_literal(atom) else numbers.get(atom) for atom in eqn.invars]
    inner = called(eqn)
    if inner is None or len(open_jaxpr(inner).invars) != len(known):
        return [v for v in known if v is not None]
    within = {var: v for var, v in zip(open_jaxpr(inner).invars, known) if v is not None}
    return [v for inner_eqn in open_jaxpr(inner).eqns for v in _reads(inner_eqn, within)]
