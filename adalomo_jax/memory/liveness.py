"""The temporaries of a traced program, by a walk over its equations, as a compiler would lay them out.

The compiler is modelled by five rules:

- What is computed elementwise exists only where a matmul, a loop, a sort or the caller reads it; else it is part of
  what reads it. So of a slice, a cast, a broadcast.
- A reduction's operand need not exist; its result does.
- A buffer lives from the equation that makes it to the last one that reads it, directly or through such values.
- A matmul reads its operands transposed, if it has to.
- A loop carries its values in place where nothing else reads them later, and so does a write into a slice.

A TPU's compiler adds three:

- An input that lies transposed is copied where that does not suit what reads it.
- A broadcast constant that a loop reads is part of its body.
- What a stretch of the program without loops makes and reads lies in the vector memory, while there is room.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adalomo_jax.fused.jaxpr import Equation, Program, program_of, scan_of

_CALLS = ("remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "closed_call")
_LOOPS = ("scan", "while", "cond")
_OPAQUE = (
    *("dot_general", "ragged_dot_general", "conv_general_dilated", "sort", "top_k", "fft"),
    *("rng_bit_generator", "pallas_call", "shard_map", "cholesky", "triangular_solve"),
)
"""What reads and writes whole buffers."""
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "arg", "cum")
_CONSTANTS = ("broadcast_in_dim", "convert_element_type")
"""What of constants alone is sunk into the loop that reads it."""
_WRITES = ("dynamic_update_slice", "scatter", "scatter-add", "scatter_add")


class _Operation(NamedTuple):
    """An equation of the flattened program."""

    equation: Equation
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class _Flat(NamedTuple):
    """A program without calls, its values numbered anew."""

    operations: list[_Operation]
    inputs: list[int]
    outputs: list[int]
    sizes: dict[int, int]


class _Made(NamedTuple):
    """The buffers of a program."""

    by_operation: list[list[int]]
    last_read: dict[int, int]
    """The last operation that reads a buffer."""
    written_out: set[int]
    """Those that an output in an input's place is computed from, and which are written there."""


def temporary_bytes(
    program: Program,
    in_place: Mapping[int, int],
    scanned: Collection[int] = (),
    *,
    copied: Mapping[int, int] = MappingProxyType({}),
    vector_bytes: int | None = None,
) -> int:
    """The most bytes that a program has in use besides its inputs, and the outputs that take an input's place.

    Args:
        program: traced.
        in_place: of outputs that take the place of an input, the input's position by the output's.
        scanned: the positions of inputs that are slices of arrays that exist outside.
        copied: of inputs that lie with their last two dimensions swapped, the bytes of a copy that does not, by
            position. It is made where a loop with matmuls carries the input or its rows are gathered; else the input is
            read as it lies, and it is its own transpose.
        vector_bytes: of a TPU, the size of the vector memory, which is not counted; 0 where results do not go there.
            None of other chips.
    """
    flat = _flatten(program)
    swapped = {flat.inputs[p]: size for p, size in copied.items()}
    flat.sizes.update(swapped)
    copies = _read_by_rows(flat).intersection(swapped)
    needed = _needed_whole(flat, sinks=vector_bytes is not None)
    made = _made(flat, in_place, scanned, needed, swapped)
    allocated = [[*(flat.inputs[p] for p in scanned if flat.inputs[p] in needed), *copies], *made.by_operation]
    last = made.last_read
    lives = {v: (i, max(last.get(v, i - 1) + 1, i)) for i, buffers in enumerate(allocated) for v in buffers}
    short = _between_loops(lives, flat).difference(made.written_out, allocated[0]) if vector_bytes else set[int]()
    inner = [0, *(_inside(operation, vector_bytes) for operation in flat.operations)]
    return _most_alive(lives, inner, flat.sizes, short, vector_bytes or 0)


def _made(
    flat: _Flat, in_place: Mapping[int, int], scanned: Collection[int], needed: Set[int], swapped: Collection[int]
) -> _Made:
    slices = [flat.inputs[p] for p in scanned]
    sources = {v: frozenset([v]) for v in flat.inputs}
    sources |= {v: frozenset() for v in slices if v not in needed}
    given = {flat.inputs[p] for p in in_place.values()}
    replacing = {flat.outputs[out] for out in in_place}
    last_direct = {v: i for i, operation in enumerate(flat.operations) for v in operation.inputs}
    last_direct |= dict.fromkeys(flat.outputs, len(flat.operations))
    kept = set(flat.inputs).difference(slices, given)
    made = _Made([], {}, set())
    for i, operation in enumerate(flat.operations):
        reads = frozenset[int]().union(*(sources.get(v, frozenset()) for v in operation.inputs))
        reused = _reused(operation, sources, lambda v, i=i: last_direct[v] <= i and not kept & sources[v])
        new, exists = [], False
        for v in operation.outputs:
            if v in reused:
                sources[v], exists = sources[reused[v]], True
            elif operation.inputs and operation.inputs[0] in swapped and _swaps_last_two(operation.equation):
                sources[v] = frozenset()
            elif v in needed or _is_whole(operation):
                sources[v], exists = frozenset([v]), True
                new += [] if v in replacing else [v]
                made.written_out.update(reads if v in replacing else ())
            else:
                sources[v] = reads
        if exists:
            made.last_read.update(dict.fromkeys(reads, i))
        made.by_operation.append(new)
    for v in flat.outputs:
        made.last_read.update(dict.fromkeys(sources.get(v, ()), len(flat.operations)))
    return made


def _most_alive(
    lives: Mapping[int, tuple[int, int]], inner: Sequence[int], sizes: Mapping[int, int], short: Set[int], room: int
) -> int:
    """Given what each operation needs inside, and of each buffer the first and the last at which it is there.

    Those of ``short`` are not counted where there is room for them, the earlier ones first.
    """
    begun: list[list[int]] = [[] for _ in inner]
    ended: list[list[int]] = [[] for _ in inner]
    for v, (first, last) in lives.items():
        begun[first].append(v)
        ended[min(last, len(inner) - 1)].append(v)
    uncounted = set[int]()
    alive = most = 0
    for new, inside, old in zip(begun, inner, ended, strict=True):
        for v in new:
            if v in short and sizes[v] <= room:
                uncounted.add(v)
                room -= sizes[v]
            else:
                alive += sizes[v]
        most = max(most, alive + inside)
        for v in old:
            room += sizes[v] if v in uncounted else 0
            alive -= sizes[v] if v not in uncounted else 0
    return most


def _between_loops(lives: Mapping[int, tuple[int, int]], flat: _Flat) -> set[int]:
    """Buffers that are there at no loop and no kernel, which read and write the chip's main memory."""
    barriers = [operation.equation.name in (*_LOOPS, "pallas_call") for operation in flat.operations]
    before = list(accumulate([False, *barriers, False], initial=0))
    return {v for v, (first, last) in lives.items() if before[first] == before[last + 1]}


def _is_whole(operation: _Operation) -> bool:
    """Whether the results exist as buffers, whoever reads them."""
    name = operation.equation.name
    return name in (*_OPAQUE, *_LOOPS, *_WRITES) or name.startswith(_REDUCTIONS)


def _needed_whole(flat: _Flat, sinks: bool) -> set[int]:
    """The values that have to exist as buffers, for what reads them."""
    needed, transposed = set(flat.outputs), {}
    constant = set(flat.sizes).difference(flat.inputs, *(operation.outputs for operation in flat.operations))
    for operation in flat.operations:
        name = operation.equation.name
        if name in _CONSTANTS and constant.issuperset(operation.inputs):
            constant.add(operation.outputs[0])
        if name == "transpose":
            transposed[operation.outputs[0]] = transposed.get(operation.inputs[0], operation.inputs[0])
        elif name == "dot_general":
            needed.update(transposed.get(v, v) for v in operation.inputs)
        elif name in (*_OPAQUE, *_LOOPS):
            needed.update(operation.inputs if name != "scan" or not sinks else _not_sunk(operation, constant))
        if operation.equation.name in _WRITES:
            needed.add(operation.inputs[0])
    for operation in reversed(flat.operations):
        if operation.equation.name == "optimization_barrier":
            needed.update(v for v, out in zip(operation.inputs, operation.outputs) if out in needed)
    return needed


def _not_sunk(operation: _Operation, constant: Set[int]) -> Iterable[int]:
    """The operands of a loop that are no broadcast constants, which it makes anew, and those that it carries."""
    first = scan_of(operation.equation).num_consts
    return (v for k, v in enumerate(operation.inputs) if k >= first or v not in constant)


def _reused(operation: _Operation, sources: Mapping[int, frozenset[int]], may_reuse: Any) -> dict[int, int]:
    """Of results that lie where an operand lay, the operand."""
    name, (inputs, outputs) = operation.equation.name, operation[1:]
    if name == "optimization_barrier":
        return dict(zip(outputs, inputs))
    if name in _WRITES:
        carried = [(outputs[0], inputs[0])]
    elif name == "scan":
        scan = scan_of(operation.equation)
        carried = list(zip(outputs[: scan.num_carry], inputs[scan.num_consts : scan.first_xs]))
    elif name == "while":
        carried = list(zip(outputs, inputs[len(inputs) - len(outputs) :]))
    else:
        return {}
    return {out: v for out, v in carried if sources.get(v) and may_reuse(v)}


def _read_by_rows(flat: _Flat) -> set[int]:
    """What a loop with matmuls carries, and what rows are gathered from."""
    found = set[int]()
    for equation, inputs, _ in flat.operations:
        if equation.name == "scan":
            scan = scan_of(equation)
            if any(inner.equation.name == "dot_general" for inner in _flatten(scan.body).operations):
                found.update(inputs[scan.num_consts : scan.first_xs])
        elif equation.name == "gather":
            found.update(inputs)
    return found


def _swaps_last_two(equation: Equation) -> bool:
    order = list(equation.params["permutation"]) if equation.name == "transpose" else []
    return bool(order) and order == [*range(len(order) - 2), len(order) - 1, len(order) - 2]


def _inside(operation: _Operation, vector_bytes: int | None) -> int:
    """What one iteration of a loop, or a branch, needs."""
    name, params = operation.equation.name, operation.equation.params
    if name == "scan":
        scan = scan_of(operation.equation)
        in_place = {k: scan.num_consts + k for k in range(scan.num_carry)}
        scanned = range(scan.first_xs, len(scan.body.inputs))
        return temporary_bytes(scan.body, in_place, scanned, vector_bytes=vector_bytes)
    if name == "while":
        body = program_of(params["body_jaxpr"])
        first = len(body.inputs) - len(body.outputs)
        return temporary_bytes(body, {k: first + k for k in range(len(body.outputs))}, vector_bytes=vector_bytes)
    if name == "cond":
        of_branch = lambda branch: temporary_bytes(program_of(branch), {}, vector_bytes=vector_bytes)
        return max(map(of_branch, params["branches"]))
    return 0


def _flatten(program: Program) -> _Flat:
    flat = _Flat([], [], [], {})

    def number(aval: Any) -> int:
        v = len(flat.sizes)
        flat.sizes[v] = _bytes(aval)
        return v

    def add(program: Program, given: Iterable[int]) -> list[int]:
        numbers = dict(zip(program.inputs, given, strict=True))
        for v in program.constants:
            numbers[v] = number(program.avals[v])
        for equation in program.equations:
            inputs = tuple(numbers[v] for v in equation.inputs)
            if equation.name in _CALLS:
                outputs = tuple(add(_called(equation), inputs))
            else:
                outputs = tuple(number(program.avals[v]) for v in equation.outputs)
                flat.operations.append(_Operation(equation, inputs, outputs))
            numbers |= zip(equation.outputs, outputs, strict=True)
        return [numbers[v] for v in program.outputs]

    flat.inputs.extend(number(program.avals[v]) for v in program.inputs)
    flat.outputs.extend(add(program, flat.inputs))
    return flat


def _called(equation: Equation) -> Program:
    jaxpr = equation.params.get("jaxpr", equation.params.get("call_jaxpr", equation.params.get("fun_jaxpr")))
    return program_of(jaxpr)


def _bytes(aval: Any) -> int:
    dtype = aval.dtype
    size = jnp.dtype(dtype).itemsize if not jnp.issubdtype(dtype, jax.dtypes.extended) else 16
    return math.prod(aval.shape) * size
