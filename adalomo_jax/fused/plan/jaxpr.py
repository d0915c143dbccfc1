"""Programs: flat lists of equations, read from a jaxpr.

Values are numbered. Calls that only group equations (``jit``, ``closed_call``, a ``checkpoint`` around a scan over
parameters) are replaced by what they call, and equations whose results nobody reads are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from adalomo_jax.jax_versions import (
    CALLS,
    CHECKPOINT,
    CUSTOM,
    bind,
    called,
    context_of,
    explicit_sharding,
    has_effects,
    is_literal,
    open_jaxpr,
    scan_counts,
    vary_along,
    varying_axes,
)

if TYPE_CHECKING:
    from adalomo_jax.jax_versions import JaxprEqn


class Equation(NamedTuple):
    """One operation: the JAX equation that it came from, and the numbers of the values it reads and makes."""

    source: JaxprEqn
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.source.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """The primitive's parameters."""
        return self.source.params

    @property
    def context(self) -> str:
        """The settings around it: the precision of products, a mesh, where it computes."""
        return context_of(self.source)

    @property
    def has_effects(self) -> bool:
        """Whether it does more than make its results: it prints, or calls back. Naming a mesh axis is not an effect."""
        return has_effects(self.source)

    def reads_literal(self, position: int) -> bool:
        """Whether its input at this position is a literal: a number that stands in the program."""
        return is_literal(self.source.invars[position])

    def with_params(self, **params: Any) -> Equation:
        """This equation with some of the primitive's parameters changed."""
        return self._replace(source=self.source.replace(params=self.params | params))


@dataclass(frozen=True, eq=False)
class Program:
    """A traced function: `inputs` and `constants` go through `equations` to `outputs`; all are numbers of values."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    equations: tuple[Equation, ...]
    constants: Mapping[int, Any]
    avals: Sequence[Any]
    """The shape and dtype of each value, by its number."""

    def zeros(self, v: int, leading: tuple[int, ...] = (), dtype: Any = None) -> jax.Array:
        """Zeros like a value, spread like it; with further axes in front, or of another dtype."""
        aval, sharding = self.avals[v], explicit_sharding(self.avals[v])
        if sharding is not None:
            sharding = sharding.update(spec=PartitionSpec(*(None,) * len(leading), *sharding.spec))
        zeros = jnp.zeros((*leading, *aval.shape), dtype or aval.dtype, out_sharding=sharding)
        return vary_along(zeros, varying_axes(aval))


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


@dataclass(frozen=True, eq=False)
class While:
    """The parts of a ``lax.while_loop`` equation, which is applied to the constants of both, then to the carry."""

    cond: Program
    """``cond(*cond_consts, *carry) -> whether to go on``."""
    body: Program
    """``body(*body_consts, *carry) -> *carry``."""
    num_cond_consts: int
    num_body_consts: int


def trace(fn: Callable[..., Any], leaves: Sequence[Any], *args: Any) -> tuple[Program, Any]:
    """The program of ``fn(leaves, *args)``, whose inputs are the leaves, then the leaves of ``args``.

    Returns it with the structure of the result, whose leaves are its outputs.
    """
    with jax.disable_jit(False):  # otherwise JAX traces what loops run, and no scan is found
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(list(leaves), *args)
    return program_of(closed, num_leaves=len(leaves)), jax.tree.structure(shape)


def program_of(jaxpr: Any, num_leaves: int = 0) -> Program:
    """The flat program of a jaxpr, with the values that it closes over as constants.

    Args:
      jaxpr: a jaxpr, open or closed.
      num_leaves: the number of parameters, the first inputs. A ``checkpoint`` around a scan over one of them is opened.
    """
    builder = _Builder()
    inputs = [builder.number(var.aval) for var in open_jaxpr(jaxpr).invars]
    outputs = builder.inline(jaxpr, inputs, leaves=frozenset(inputs[:num_leaves]))
    equations = _live(builder.equations, outputs)
    return Program(tuple(inputs), tuple(outputs), tuple(equations), builder.constants, builder.avals)


def retrace(program: Program, run: Callable[[dict[int, Any]], list[Any]], num_leaves: int) -> Program:
    """The program of ``run``, which makes a program's outputs from its inputs and constants, by their numbers."""
    fn = lambda *inputs: run({**program.constants, **dict(zip(program.inputs, inputs, strict=True))})
    with jax.disable_jit(False):
        closed = jax.make_jaxpr(fn)(*(program.avals[v] for v in program.inputs))
    return program_of(closed, num_leaves)


def with_opened(program: Program, opened: Container[Equation]) -> Program:
    """The program with some of its checkpoints replaced by what they run."""
    builder, same = _Builder(), dict[int, int]()
    builder.avals, builder.constants = list(program.avals), dict(program.constants)
    for equation in program.equations:
        inputs = tuple(same.get(v, v) for v in equation.inputs)
        if equation in opened:
            same |= zip(equation.outputs, builder.inline(called(equation.source), inputs, frozenset()), strict=True)
        else:
            builder.equations.append(equation._replace(inputs=inputs))
    outputs = tuple(same.get(v, v) for v in program.outputs)
    return Program(program.inputs, outputs, tuple(builder.equations), builder.constants, builder.avals)


def evaluate(equations: Iterable[Equation], values: dict[int, Any]) -> None:
    """Runs equations on ``values``, and adds their results to it."""
    for equation in equations:
        results = bind(equation.source, [values[v] for v in equation.inputs])
        values.update(zip(equation.outputs, results))


def scan_of(equation: Equation) -> Scan:
    """The parts of a scan equation."""
    params = equation.source.params
    num_consts, num_carry = scan_counts(equation.source)
    body = program_of(params["jaxpr"])
    return Scan(body, num_consts, num_carry, params["length"], params["reverse"], params["unroll"])


def while_of(equation: Equation) -> While:
    """The parts of a while equation."""
    params = equation.params
    cond, body = program_of(params["cond_jaxpr"]), program_of(params["body_jaxpr"])
    return While(cond, body, params["cond_nconsts"], params["body_nconsts"])


def branches_of(equation: Equation) -> Sequence[Any]:
    """The jaxprs of a cond equation, each applied to all operands but the first."""
    return equation.params["branches"]


def called_as_it_is(equation: Equation) -> Any:
    """The jaxpr of a checkpoint or custom derivative, if its results on the operands are the equation's, or None."""
    inner = called(equation.source)
    is_such = is_checkpoint(equation) or equation.name in CUSTOM
    return inner if is_such and len(open_jaxpr(inner).invars) == len(equation.inputs) else None


def has_own_derivative(equation: Equation) -> bool:
    """Whether the equation is a ``jax.custom_jvp`` or a ``jax.custom_vjp``."""
    return equation.name in CUSTOM


def pullback_of(equation: Equation) -> Program:
    """The program of an equation's derivative. Its inputs are the operands, then the cotangents of the results."""
    type_of: Any = lambda var: jax.ShapeDtypeStruct(
        var.aval.shape, var.aval.dtype, sharding=explicit_sharding(var.aval)
    )
    operands, results = list(map(type_of, equation.source.invars)), list(map(type_of, equation.source.outvars))
    active, kept = ([k for k, x in enumerate(xs) if jnp.issubdtype(x.dtype, jnp.inexact)] for xs in (operands, results))
    numbers = range(len(operands) + len(results))
    numbered = equation._replace(inputs=tuple(numbers[: len(operands)]), outputs=tuple(numbers[len(operands) :]))

    def pull(operands: list[Any], d_results: list[Any]) -> Any:
        def run(xs: list[Any]) -> list[Any]:
            values = dict(enumerate(operands)) | dict(zip(active, xs))
            evaluate([numbered], values)
            return [values[numbered.outputs[k]] for k in kept]

        return jax.vjp(run, [operands[k] for k in active])[1](d_results)

    return trace(pull, operands, [results[k] for k in kept])[0]


def live_program(program: Program, outputs: Iterable[int]) -> Program:
    """The program of some outputs, by their positions, and of the equations that they depend on."""
    wanted = tuple(program.outputs[p] for p in outputs)
    return replace(program, outputs=wanted, equations=tuple(_live(program.equations, wanted)))


def called_by(equation: Equation) -> Program:
    """The program that a checkpoint runs."""
    return program_of(called(equation.source))


def is_checkpoint(equation: Equation) -> bool:
    """Whether the equation is a ``jax.checkpoint``."""
    return equation.name == CHECKPOINT


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
        consts, jaxpr = getattr(jaxpr, "consts", ()), open_jaxpr(jaxpr)
        numbers = dict(zip(jaxpr.invars, inputs, strict=True))
        numbers |= {var: self.constant(var.aval, value) for var, value in zip(jaxpr.constvars, consts, strict=True)}

        def read(atom: Any) -> int:
            return self.constant(atom.aval, atom.val) if is_literal(atom) else numbers[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            if _only_groups(eqn, [v in leaves for v in operands]):
                results = self.inline(called(eqn), operands, leaves)
            else:
                results = [self.number(var.aval) for var in eqn.outvars]
                self.equations.append(Equation(eqn, tuple(operands), tuple(results)))
            numbers |= zip(eqn.outvars, results)
        return [read(atom) for atom in jaxpr.outvars]


def _only_groups(eqn: JaxprEqn, are_leaves: Sequence[bool]) -> bool:
    name = eqn.primitive.name
    return name in CALLS or (name == CHECKPOINT and _scans_over(open_jaxpr(called(eqn)), are_leaves))


def _scans_over(jaxpr: Any, are_leaves: Sequence[bool]) -> bool:
    """Whether a scan in the jaxpr runs over an input that is a leaf, as it is or cast or transposed."""
    leaves = {var for var, is_leaf in zip(jaxpr.invars, are_leaves, strict=True) if is_leaf}
    for eqn in jaxpr.eqns:
        flags = [not is_literal(atom) and atom in leaves for atom in eqn.invars]
        if eqn.primitive.name == "scan" and any(flags[sum(scan_counts(eqn)) :]):
            return True
        if eqn.primitive.name in (*CALLS, CHECKPOINT) and _scans_over(open_jaxpr(called(eqn)), flags):
            return True
        if eqn.primitive.name in ("convert_element_type", "transpose", "reshape") and any(flags):
            leaves.update(eqn.outvars)
    return False


def _live(equations: Sequence[Equation], outputs: Iterable[int]) -> list[Equation]:
    """The equations that the outputs depend on, and those with effects."""
    needed, live = set(outputs), []
    for equation in reversed(equations):
        if equation.has_effects or needed.intersection(equation.outputs):
            needed.update(equation.inputs)
            live.append(equation)
    return live[::-1]
