"""Programs: flat lists of equations, read from a jaxpr. All that depends on JAX's version is here.

Values are numbered. Calls that only group equations (``jit``, ``closed_call``, a ``checkpoint`` around a scan over
parameters) are replaced by what they call, and equations whose results nobody reads are dropped.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src import source_info_util
from jax.extend import core

_CALLS = ("jit", "closed_call")
_CHECKPOINT = "remat2"


class Equation(NamedTuple):
    """One operation: the JAX equation that it came from, and the numbers of the values it reads and makes."""

    source: core.JaxprEqn
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.source.primitive.name


@dataclass(frozen=True, eq=False)
class Program:
    """A traced function: `inputs` and `constants` go through `equations` to `outputs`; all are numbers of values."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    equations: tuple[Equation, ...]
    constants: Mapping[int, Any]
    avals: Sequence[Any]
    """Of each number the shape and dtype."""

    def zeros(self, v: int) -> jax.Array:
        """Zeros like a value."""
        return jnp.zeros(self.avals[v].shape, self.avals[v].dtype)


@dataclass(frozen=True, eq=False)
class Scan:
    """The parts of a ``lax.scan`` equation: ``body(*consts, *carry, *xs) -> *carry, *ys``."""

    body: Program
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: int

    @property
    def first_xs(self) -> int:
        """The position of the first scanned input."""
        return self.num_consts + self.num_carry


def trace(fn: Callable[..., Any], leaves: Sequence[Any], *args: Any) -> tuple[Program, Any]:
    """The program of ``fn(leaves, *args)``, whose inputs are the leaves and then those of ``args``.

    Returns it with the structure of the result, whose leaves are its outputs.
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(list(leaves), *args)
    return program_of(closed, num_leaves=len(leaves)), jax.tree.structure(shape)


def program_of(jaxpr: Any, num_leaves: int = 0) -> Program:
    """The flat program of a jaxpr, with the values that it closes over as constants.

    Args:
      jaxpr: a jaxpr, open or closed.
      num_leaves: so many inputs are parameters, and a ``checkpoint`` around a scan over one of them is opened.
    """
    builder = _Builder()
    inputs = [builder.number(var.aval) for var in _open(jaxpr).invars]
    outputs = builder.inline(jaxpr, inputs, leaves=frozenset(inputs[:num_leaves]))
    equations = _live(builder.equations, outputs)
    return Program(tuple(inputs), tuple(outputs), tuple(equations), builder.constants, builder.avals)


def evaluate(equations: Iterable[Equation], values: dict[int, Any]) -> None:
    """Runs equations on ``values``, and adds their results to it."""
    for equation in equations:
        source = equation.source
        params = source.primitive.get_bind_params(source.params)
        operands = [values[v] for v in equation.inputs]
        name_stack = source_info_util.current_name_stack() + source.source_info.name_stack
        with source_info_util.user_context(source.source_info.traceback, name_stack=name_stack), source.ctx.manager:
            results = source.primitive.bind(*operands, **params)
        values.update(zip(equation.outputs, results if source.primitive.multiple_results else [results]))


def scan_of(equation: Equation) -> Scan:
    """The parts of a scan equation."""
    params = equation.source.params
    num_consts, num_carry = _scan_counts(equation.source)
    body = program_of(params["jaxpr"])
    return Scan(body, num_consts, num_carry, params["length"], params["reverse"], params["unroll"])


def is_differentiable(aval: Any) -> bool:
    """Whether values of this type have cotangents of their own type."""
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def active_values(program: Program, active_inputs: Iterable[int]) -> set[int]:
    """The values that depend on the active inputs and are differentiable."""
    active = {v for v in active_inputs if is_differentiable(program.avals[v])}
    for equation in program.equations:
        flags = _active_outputs(equation, [v in active for v in equation.inputs])
        active |= {v for v, flag in zip(equation.outputs, flags) if flag and is_differentiable(program.avals[v])}
    return active


def active_in_scan(scan: Scan, active_operands: Sequence[bool]) -> set[int]:
    """The active values of a scan's body, once activity has gone around through the carry."""
    inputs, outputs = scan.body.inputs, scan.body.outputs
    active = {v for v, flag in zip(inputs, active_operands) if flag}
    while True:
        values = active_values(scan.body, active)
        fed_back = {inputs[scan.num_consts + i] for i, v in enumerate(outputs[: scan.num_carry]) if v in values}
        if fed_back <= active:
            return values
        active |= fed_back


def _active_outputs(equation: Equation, active_inputs: Sequence[bool]) -> list[bool]:
    if any(active_inputs) and equation.name == "scan":
        scan = scan_of(equation)
        active = active_in_scan(scan, active_inputs)
        carry = scan.body.inputs[scan.num_consts : scan.first_xs]
        outputs = scan.body.outputs
        return [v in active for v in carry] + [v in active for v in outputs[scan.num_carry :]]
    return [any(active_inputs)] * len(equation.outputs)


class _Builder:
    """Collects the equations of nested jaxprs under one numbering."""

    def __init__(self):
        self.avals: list[Any] = []
        self.constants: dict[int, Any] = {}
        self.equations: list[Equation] = []

    def number(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def constant(self, aval: Any, value: Any) -> int:
        number = self.number(aval)
        self.constants[number] = value
        return number

    def inline(self, jaxpr: Any, inputs: Sequence[int], leaves: frozenset[int]) -> list[int]:
        """Adds a jaxpr's equations, applied to ``inputs``; returns the numbers of its outputs."""
        consts, jaxpr = getattr(jaxpr, "consts", ()), _open(jaxpr)
        numbers = dict(zip(jaxpr.invars, inputs, strict=True))
        numbers |= {var: self.constant(var.aval, value) for var, value in zip(jaxpr.constvars, consts, strict=True)}

        def read(atom: Any) -> int:
            return self.constant(atom.aval, atom.val) if isinstance(atom, core.Literal) else numbers[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            if _only_groups(eqn, [v in leaves for v in operands]):
                results = self.inline(_called(eqn), operands, leaves)
            else:
                results = [self.number(var.aval) for var in eqn.outvars]
                self.equations.append(Equation(eqn, tuple(operands), tuple(results)))
            numbers |= zip(eqn.outvars, results)
        return [read(atom) for atom in jaxpr.outvars]


def _open(jaxpr: Any) -> Any:
    """Up to JAX 0.11 a jaxpr with its constants wraps one without; then it is one."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _called(eqn: core.JaxprEqn) -> Any:
    return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))


def _only_groups(eqn: core.JaxprEqn, are_leaves: Sequence[bool]) -> bool:
    name = eqn.primitive.name
    return name in _CALLS or (name == _CHECKPOINT and _scans_over(_open(_called(eqn)), are_leaves))


def _scans_over(jaxpr: Any, are_leaves: Sequence[bool]) -> bool:
    """Whether a scan in the jaxpr runs over an input that is a leaf."""
    leaves = {var for var, is_leaf in zip(jaxpr.invars, are_leaves, strict=True) if is_leaf}
    for eqn in jaxpr.eqns:
        flags = [not isinstance(atom, core.Literal) and atom in leaves for atom in eqn.invars]
        if eqn.primitive.name == "scan" and any(flags[sum(_scan_counts(eqn)) :]):
            return True
        if eqn.primitive.name in (*_CALLS, _CHECKPOINT) and _scans_over(_open(_called(eqn)), flags):
            return True
    return False


def _scan_counts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """The numbers of a scan's constants and carried values."""
    if "ft_in" in eqn.params:  # since JAX 0.12
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


def _live(equations: Sequence[Equation], outputs: Iterable[int]) -> list[Equation]:
    """The equations that the outputs depend on, and those with effects."""
    needed, live = set(outputs), []
    for equation in reversed(equations):
        if equation.source.effects or needed.intersection(equation.outputs):
            needed.update(equation.inputs)
            live.append(equation)
    return live[::-1]
