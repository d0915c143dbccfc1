"""Programs: flat lists of equations, read from a jaxpr. All that depends on JAX's version is here.

Values are numbered. Calls that only group equations (``jit``, ``closed_call``, a ``checkpoint`` around a scan over
parameters) are replaced by what they call, and equations whose results nobody reads are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import source_info_util
from jax._src.core import AbstractValue
from jax.sharding import AxisType, PartitionSpec

if TYPE_CHECKING:
    from jax.extend import core

_CALLS = ("jit", "closed_call")
_CHECKPOINT = "remat2"
_CUSTOM = ("custom_jvp_call", "custom_vjp_call")


class Equation(NamedTuple):
    """One operation: the JAX equation that it came from, and the numbers of the values it reads and makes."""

    source: core.JaxprEqn
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
        """What was set around it: the precision of products, a mesh, where it computes."""
        context = self.source.ctx
        names = [name for name in getattr(type(context), "__slots__", None) or vars(context) if name[0] != "_"]
        return str([(name, getattr(context, name, None)) for name in sorted(names) if name != "manager"])

    @property
    def has_effects(self) -> bool:
        """Whether it does more than make its results: it prints, or calls back. To name a mesh axis is no effect."""
        return any(type(effect).__name__ != "NamedAxisEffect" for effect in self.source.effects)

    def reads_literal(self, position: int) -> bool:
        """Whether what it reads at this position is a number that stands in the program."""
        return _is_literal(self.source.invars[position])

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
    """Of each number the shape and dtype."""

    def zeros(self, v: int, leading: tuple[int, ...] = (), dtype: Any = None) -> jax.Array:
        """Zeros like a value, spread like it; with further axes in front, or of another dtype."""
        aval, sharding = self.avals[v], _explicit(self.avals[v])
        if sharding is not None:
            sharding = sharding.update(spec=PartitionSpec(*(None,) * len(leading), *sharding.spec))
        zeros = jnp.zeros((*leading, *aval.shape), dtype or aval.dtype, out_sharding=sharding)
        return lax.pcast(zeros, tuple(sorted(varying_axes(aval))), to="varying")


def _explicit(aval: Any) -> Any:
    """How a value is spread, if its type says it: on an explicit mesh."""
    return aval.sharding if AxisType.Explicit in aval.sharding.mesh.axis_types else None


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
    """The parts of a ``lax.while_loop`` equation, applied to the constants of both, then what it carries."""

    cond: Program
    """``cond(*cond_consts, *carry) -> whether to go on``."""
    body: Program
    """``body(*body_consts, *carry) -> *carry``."""
    num_cond_consts: int
    num_body_consts: int


def trace(fn: Callable[..., Any], leaves: Sequence[Any], *args: Any) -> tuple[Program, Any]:
    """The program of ``fn(leaves, *args)``, whose inputs are the leaves and then those of ``args``.

    Returns it with the structure of the result, whose leaves are its outputs.
    """
    with jax.disable_jit(False):  # else loops are traced as what they run, and no scan is found
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


def retrace(program: Program, run: Callable[[dict[int, Any]], list[Any]], num_leaves: int) -> Program:
    """The program of ``run``, which makes a program's outputs of its inputs and constants, by their numbers."""
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
            same |= zip(equation.outputs, builder.inline(_called(equation.source), inputs, frozenset()), strict=True)
        else:
            builder.equations.append(equation._replace(inputs=inputs))
    outputs = tuple(same.get(v, v) for v in program.outputs)
    return Program(program.inputs, outputs, tuple(builder.equations), builder.constants, builder.avals)


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


def while_of(equation: Equation) -> While:
    """The parts of a while equation."""
    params = equation.params
    cond, body = program_of(params["cond_jaxpr"]), program_of(params["body_jaxpr"])
    return While(cond, body, params["cond_nconsts"], params["body_nconsts"])


def branches_of(equation: Equation) -> Sequence[Any]:
    """The jaxprs of a cond equation, each applied to all operands but the first."""
    return equation.params["branches"]


def called_as_it_is(equation: Equation) -> Any:
    """The jaxpr whose results on the operands are the equation's, or None: a checkpoint, a custom derivative."""
    called = _called(equation.source)
    is_such = is_checkpoint(equation) or equation.name in _CUSTOM
    return called if is_such and len(_open(called).invars) == len(equation.inputs) else None


def has_own_derivative(equation: Equation) -> bool:
    """Whether the equation is a ``jax.custom_jvp`` or a ``jax.custom_vjp``."""
    return equation.name in _CUSTOM


def pullback_of(equation: Equation) -> Program:
    """What an equation's derivative computes, of its operands and then of its results' cotangents."""
    type_of: Any = lambda var: jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype, sharding=_explicit(var.aval))
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


def is_jaxpr(value: Any) -> bool:
    """Whether it is a jaxpr, open or closed."""
    return hasattr(value, "eqns") and hasattr(_open(value), "invars")


def live_program(program: Program, outputs: Iterable[int]) -> Program:
    """The program of some outputs, by their positions, and of the equations that they depend on."""
    wanted = tuple(program.outputs[p] for p in outputs)
    return replace(program, outputs=wanted, equations=tuple(_live(program.equations, wanted)))


def primitives_of(equations: Iterable[Equation]) -> set[str]:
    """The names of the primitives, those within calls, branches and loops too."""
    return set().union(*(_primitives(equation.source) for equation in equations))


def largest_made(equations: Sequence[Equation]) -> int:
    """The bytes of the largest value that an equation makes, those within calls, branches and loops too."""
    return max((_largest(equation.source) for equation in equations), default=0)


def called_by(equation: Equation) -> Program:
    """What a checkpoint runs."""
    return program_of(_called(equation.source))


def has_programs(equation: Equation) -> bool:
    """Whether an equation runs others."""
    return bool(_inner(equation.source))


def reads_in_order(program: Program) -> list[int]:
    """The inputs in the order in which the equations first read them, those within calls and checkpoints too."""
    reads: list[int] = []
    for equation in program.equations:
        pairs = zip(equation.source.invars, equation.inputs)
        reads += _reads(equation.source, {var: v for var, v in pairs if not _is_literal(var)})
    return [v for v in dict.fromkeys(reads) if v in program.inputs]


def varying_axes(x: Any) -> frozenset[str]:
    """The axes of a ``shard_map``'s mesh along which an array, or a type, may differ; none with ``check_vma=False``."""
    aval: Any = x if isinstance(x, AbstractValue) else jax.typeof(x)
    return aval.mat.varying if hasattr(aval, "mat") else getattr(aval, "vma", frozenset())  # `vma` before JAX 0.10.2


def reads_references(program: Program) -> bool:
    """Whether it, or a scan in it, changes arrays in place (``jax.new_ref``): what depends on what is unknown."""
    is_reference = lambda aval: hasattr(aval, "inner_aval")
    return any(map(is_reference, program.avals)) or any(
        reads_references(scan_of(equation).body) for equation in program.equations if equation.name == "scan"
    )


def is_checkpoint(equation: Equation) -> bool:
    """Whether the equation is a ``jax.checkpoint``."""
    return equation.name == _CHECKPOINT


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
            return self.constant(atom.aval, atom.val) if _is_literal(atom) else numbers[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            if _only_groups(eqn, [v in leaves for v in operands]):
                results = self.inline(_called(eqn), operands, leaves)
            else:
                results = [self.number(var.aval) for var in eqn.outvars]
                self.equations.append(Equation(eqn, tuple(operands), tuple(results)))
            numbers |= zip(eqn.outvars, results)
        return [read(atom) for atom in jaxpr.outvars]


def _is_literal(atom: Any) -> bool:
    """Whether it is a ``jax.extend.core.Literal``. That module is not imported: it brings Pallas, for 20 ms."""
    return hasattr(atom, "val")


def _open(jaxpr: Any) -> Any:
    """Up to JAX 0.11 a jaxpr with its constants wraps one without; then it is one."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _called(eqn: core.JaxprEqn) -> Any:
    return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))


def _primitives(eqn: core.JaxprEqn) -> set[str]:
    return {eqn.primitive.name}.union(*(_primitives(e) for jaxpr in _inner(eqn) for e in _open(jaxpr).eqns))


def _largest(eqn: core.JaxprEqn) -> int:
    size: Any = lambda aval: getattr(aval, "size", 0) * getattr(getattr(aval, "dtype", None), "itemsize", 1)
    made = [size(var.aval) for var in eqn.outvars]
    return max([*made, *(_largest(e) for jaxpr in _inner(eqn) for e in _open(jaxpr).eqns)], default=0)


def _inner(eqn: core.JaxprEqn) -> list[Any]:
    """The jaxprs that an equation runs: its body, branches or derivatives."""
    return [x for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr) if is_jaxpr(x)]


def _reads(eqn: core.JaxprEqn, numbers: Mapping[Any, int]) -> list[int]:
    """The numbered variables in the order in which an equation, or those that it calls, reads them."""
    known = [None if _is_literal(atom) else numbers.get(atom) for atom in eqn.invars]
    inner = _called(eqn)
    if inner is None or len(_open(inner).invars) != len(known):
        return [v for v in known if v is not None]
    within = {var: v for var, v in zip(_open(inner).invars, known) if v is not None}
    return [v for inner_eqn in _open(inner).eqns for v in _reads(inner_eqn, within)]


def _only_groups(eqn: core.JaxprEqn, are_leaves: Sequence[bool]) -> bool:
    name = eqn.primitive.name
    return name in _CALLS or (name == _CHECKPOINT and _scans_over(_open(_called(eqn)), are_leaves))


def _scans_over(jaxpr: Any, are_leaves: Sequence[bool]) -> bool:
    """Whether a scan in the jaxpr runs over an input that is a leaf, as it is or cast or transposed."""
    leaves = {var for var, is_leaf in zip(jaxpr.invars, are_leaves, strict=True) if is_leaf}
    for eqn in jaxpr.eqns:
        flags = [not _is_literal(atom) and atom in leaves for atom in eqn.invars]
        if eqn.primitive.name == "scan" and any(flags[sum(_scan_counts(eqn)) :]):
            return True
        if eqn.primitive.name in (*_CALLS, _CHECKPOINT) and _scans_over(_open(_called(eqn)), flags):
            return True
        if eqn.primitive.name in ("convert_element_type", "transpose", "reshape") and any(flags):
            leaves.update(eqn.outvars)
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
        if equation.has_effects or needed.intersection(equation.outputs):
            needed.update(equation.inputs)
            live.append(equation)
    return live[::-1]
