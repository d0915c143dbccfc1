"""A traced program without calls: its operations, and which of its values a compiler keeps as buffers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adalomo_jax.fused.plan.jaxpr import Equation, Program, program_of, scan_of

LOOPS = ("scan", "while", "cond")
"""What runs programs of its own, which read and write whole buffers."""
_CALLS = ("remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "closed_call")
_OPAQUE = (
    *("dot_general", "ragged_dot_general", "conv_general_dilated", "sort", "top_k", "fft"),
    *("rng_bit_generator", "pallas_call", "shard_map", "cholesky", "triangular_solve"),
)
"""What reads and writes whole buffers."""
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "arg", "cum")
_CONSTANTS = ("broadcast_in_dim", "convert_element_type")
"""What of constants alone is a constant, to be made anywhere."""
WRITES = ("dynamic_update_slice", "scatter", "scatter-add", "scatter_add")
"""What puts its result where its first operand lies."""


class Operation(NamedTuple):
    """An equation of the flattened program."""

    equation: Equation
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.equation.name

    @property
    def reduces(self) -> bool:
        """Whether it is a reduction, whose operand need not exist."""
        return self.name.startswith(_REDUCTIONS)

    @property
    def is_whole(self) -> bool:
        """Whether the results exist as buffers, whoever reads them."""
        return self.name in (*_OPAQUE, *LOOPS, *WRITES) or self.reduces

    @property
    def bodies(self) -> list[Program]:
        """The programs that a loop or a branch runs."""
        params = self.equation.params
        if self.name == "scan":
            return [scan_of(self.equation).body]
        if self.name == "while":
            return [program_of(params["body_jaxpr"])]
        return [program_of(branch) for branch in params["branches"]] if self.name == "cond" else []


class Flat(NamedTuple):
    """A program without calls, its values numbered anew."""

    operations: list[Operation]
    inputs: list[int]
    outputs: list[int]
    sizes: dict[int, int]
    """Bytes of each value."""
    scalars: set[int]
    """The values that have one element."""

    @property
    def constants(self) -> set[int]:
        """The values that nothing has to be read for: what is given with the program, and broadcasts of that."""
        found = set(self.sizes).difference(self.inputs, *(operation.outputs for operation in self.operations))
        for operation in self.operations:
            if operation.name in _CONSTANTS and found.issuperset(operation.inputs):
                found.add(operation.outputs[0])
        return found


def flatten(program: Program, platform: str) -> Flat:
    """The program with what its calls and checkpoints call in their place, and the platform's among its branches."""
    flat = Flat([], [], [], {}, set())
    taken: dict[int, int] = {}

    def number(aval: Any) -> int:
        v = len(flat.sizes)
        flat.sizes[v] = _bytes(aval)
        flat.scalars.update([v] if math.prod(aval.shape) == 1 else [])
        return v

    def add(program: Program, given: Iterable[int]) -> list[int]:
        numbers = dict(zip(program.inputs, given, strict=True))
        for v in program.constants:
            numbers[v] = number(program.avals[v])
        for equation in program.equations:
            inputs = tuple(numbers[v] for v in equation.inputs)
            if equation.name in _CALLS:
                outputs = tuple(add(_called(equation), inputs))
            elif equation.name == "cond" and inputs[0] in taken:
                branch = equation.params["branches"][taken[inputs[0]]]
                outputs = tuple(add(program_of(branch), inputs[1:]))
            elif equation.name == "platform_index":
                outputs = (number(program.avals[equation.outputs[0]]),)
                taken[outputs[0]] = _branch(equation.params["platforms"], platform)
            else:
                outputs = tuple(number(program.avals[v]) for v in equation.outputs)
                flat.operations.append(Operation(equation, inputs, outputs))
            numbers |= zip(equation.outputs, outputs, strict=True)
        return [numbers[v] for v in program.outputs]

    flat.inputs.extend(number(program.avals[v]) for v in program.inputs)
    flat.outputs.extend(add(program, flat.inputs))
    return flat


def needed_whole(flat: Flat, is_tpu: bool) -> set[int]:
    """The values that have to exist as buffers, for what reads them.

    Args:
        flat: the program.
        is_tpu: whether loops are a TPU's, in which the constants that they read are made. Others' read transposes
            as they lie.
    """
    needed, transposed, constants = set(flat.outputs), {}, flat.constants
    for operation in flat.operations:
        name = operation.name
        if name == "transpose":
            transposed[operation.outputs[0]] = transposed.get(operation.inputs[0], operation.inputs[0])
        elif name == "dot_general":
            needed.update(transposed.get(v, v) for v in operation.inputs)
        elif name == "scan":
            needed.update(_not_sunk(operation, constants) if is_tpu else _untransposed(operation, transposed))
        elif name in (*_OPAQUE, *LOOPS):
            needed.update(operation.inputs)
        if name in WRITES:
            needed.add(operation.inputs[0])
    for operation in reversed(flat.operations):
        if operation.name == "optimization_barrier":
            needed.update(v for v, out in zip(operation.inputs, operation.outputs) if out in needed)
    return needed


def _not_sunk(operation: Operation, constants: Set[int]) -> Iterator[int]:
    """The operands of a loop that are no constants, which it makes anew, and those that it carries."""
    first = scan_of(operation.equation).num_consts
    return (v for k, v in enumerate(operation.inputs) if k >= first or v not in constants)


def _branch(platforms: Sequence[Sequence[str] | None], platform: str) -> int:
    """The position of the platform among those of the branches; None takes all others."""
    return next(k for k, names in enumerate(platforms) if names is None or platform in names)


def _untransposed(operation: Operation, transposed: Mapping[int, int]) -> Iterator[int]:
    """The operands of a loop, which reads as they lie those that it does not carry."""
    first = scan_of(operation.equation).num_consts
    return (transposed.get(v, v) if k < first else v for k, v in enumerate(operation.inputs))


def _called(equation: Equation) -> Program:
    jaxpr = equation.params.get("jaxpr", equation.params.get("call_jaxpr", equation.params.get("fun_jaxpr")))
    return program_of(jaxpr)


def _bytes(aval: Any) -> int:
    dtype = aval.dtype
    size = jnp.dtype(dtype).itemsize if not jnp.issubdtype(dtype, jax.dtypes.extended) else 16
    return math.prod(aval.shape) * size
