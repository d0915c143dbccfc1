"""The temporaries of a traced program, by a walk over its equations, as a compiler would lay them out.

The compiler is modelled by these rules:

- What is computed elementwise exists only where a matmul, a loop, a sort or the caller reads it; else it is part of
  what reads it. So of a slice, a cast, a broadcast.
- A reduction's operand need not exist; its result does.
- A buffer lives from the equation that makes it to the last one that reads it, directly or through such values.
- A matmul reads its operands transposed, if it has to. So do loops what they do not carry, but a TPU's.
- A loop carries its values in place where nothing else reads them later, and so does a write into a slice.
- Of branches by platform, there is only the one that is taken.

A GPU's compiler adds one:

- What loops collect into is made before the first of them.

A TPU's compiler adds three, and places the buffers by the rules of :mod:`adalomo_jax.memory.placement`:

- An input that lies transposed is copied where that does not suit what reads it.
- A broadcast constant that a loop reads is part of its body.
- A matmul whose result is only added to what it is written over adds it there, if it does not read that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from types import MappingProxyType
from typing import Any, NamedTuple

from adalomo_jax.fused.plan.jaxpr import Equation, Program, scan_of
from adalomo_jax.memory.flat import WRITES, Flat, Operation, flatten, needed_whole
from adalomo_jax.memory.placement import ANY_CHIP, Chip, Lives, most_alive


class _Made(NamedTuple):
    """The buffers of a program."""

    by_operation: list[list[int]]
    last_read: dict[int, int]
    """The last operation that reads a buffer."""
    first_read: dict[int, int]
    """The first one."""
    read_by: dict[int, frozenset[int]]
    """Of a matmul's result, what the matmul reads."""
    written_over: dict[int, int]
    """Of a matmul's result that an output in an input's place is computed from, that input."""


def temporary_bytes(
    program: Program,
    in_place: Mapping[int, int],
    scanned: Collection[int] = (),
    *,
    copied: Mapping[int, int] = MappingProxyType({}),
    chip: Chip = ANY_CHIP,
) -> int:
    """The most bytes that a program has in use besides its inputs, and the outputs that take an input's place.

    Args:
        program: traced.
        in_place: of outputs that take the place of an input, the input's position by the output's.
        scanned: the positions of inputs that are slices of arrays that exist outside.
        copied: of inputs that lie with their last two dimensions swapped, the bytes of a copy that does not, by
            position. It is made where a loop with matmuls carries the input or its rows are gathered; else the input is
            read as it lies, and it is its own transpose.
        chip: that it runs on.
    """
    flat = flatten(program, chip.platform)
    swapped = {flat.inputs[p]: size for p, size in copied.items()}
    flat.sizes.update(swapped)
    copies = _read_by_rows(flat, chip).intersection(swapped)
    needed = needed_whole(flat, is_tpu=chip.platform == "tpu")
    made = _made(flat, in_place, scanned, needed, swapped)
    given = [*(flat.inputs[p] for p in scanned if flat.inputs[p] in needed), *copies]
    lives = _lives(flat, made, given, chip)
    inner = [0, *(_inside(operation, chip) for operation in flat.operations)]
    return most_alive(flat, lives, inner, chip)


def _lives(flat: Flat, made: _Made, given: Collection[int], chip: Chip) -> Lives:
    early = _made_early(flat) if chip.platform == "cuda" else dict[int, int]()
    added = _added_in_place(made) if chip.platform == "tpu" else set[int]()
    spans = {}
    for i, buffers in enumerate([given, *made.by_operation]):
        for v in set(buffers) - added:
            spans[v] = (min(i, early.get(v, i)), max(made.last_read.get(v, i - 1) + 1, i))
    return Lives(spans, made.first_read, {*made.written_over, *given})


def _made_early(flat: Flat) -> dict[int, int]:
    """Of what loops collect, the place before the first loop."""
    loops = [i for i, operation in enumerate(flat.operations) if operation.name in ("scan", "while")]
    scans = [operation for operation in flat.operations if operation.name == "scan"]
    collected = (v for scan in scans for v in scan.outputs[scan_of(scan.equation).num_carry :])
    return dict.fromkeys(collected, loops[0]) if loops else {}


def _added_in_place(made: _Made) -> set[int]:
    """Results of matmuls that are read only where they are written over an input, which the matmul does not read."""
    once = {v for v in made.written_over if made.first_read[v] == made.last_read[v]}
    return {v for v in once if made.written_over[v] not in made.read_by[v]}


def _made(
    flat: Flat, in_place: Mapping[int, int], scanned: Collection[int], needed: Set[int], swapped: Collection[int]
) -> _Made:
    slices = [flat.inputs[p] for p in scanned]
    sources = {v: frozenset([v]) for v in flat.inputs}
    sources |= {v: frozenset() for v in slices if v not in needed}
    replacing = {flat.outputs[out]: flat.inputs[p] for out, p in in_place.items()}
    last_direct = {v: i for i, operation in enumerate(flat.operations) for v in operation.inputs}
    last_direct |= dict.fromkeys(flat.outputs, len(flat.operations))
    kept = set(flat.inputs).difference(slices, replacing.values())
    made = _Made([], {}, {}, {}, {})
    for i, operation in enumerate(flat.operations):
        reads = frozenset[int]().union(*(sources.get(v, frozenset()) for v in operation.inputs))
        reused = _reused(operation, sources, lambda v, i=i: last_direct[v] <= i and not kept & sources[v])
        new, exists = [], False
        for v in operation.outputs:
            if v in reused:
                sources[v], exists = sources[reused[v]], True
            elif operation.inputs and operation.inputs[0] in swapped and _swaps_last_two(operation.equation):
                sources[v] = frozenset()
            elif v in needed or operation.is_whole:
                sources[v], exists = frozenset([v]), True
                new += [] if v in replacing else [v]
                if v in replacing:
                    made.written_over.update(dict.fromkeys(reads.intersection(made.read_by), replacing[v]))
                if operation.name == "dot_general":
                    made.read_by[v] = reads
            else:
                sources[v] = reads
        if exists:
            made.last_read.update(dict.fromkeys(reads, i))
            made.first_read.update(dict.fromkeys(reads.difference(made.first_read), i))
        made.by_operation.append(new)
    for v in flat.outputs:
        made.last_read.update(dict.fromkeys(sources.get(v, ()), len(flat.operations)))
    return made


def _reused(operation: Operation, sources: Mapping[int, frozenset[int]], may_reuse: Any) -> dict[int, int]:
    """Of results that lie where an operand lay, the operand."""
    name, (inputs, outputs) = operation.name, operation[1:]
    if name == "optimization_barrier":
        return dict(zip(outputs, inputs))
    if name in WRITES:
        carried = [(outputs[0], inputs[0])]
    elif name == "scan":
        scan = scan_of(operation.equation)
        carried = list(zip(outputs[: scan.num_carry], inputs[scan.num_consts : scan.first_xs]))
    elif name == "while":
        carried = list(zip(outputs, inputs[len(inputs) - len(outputs) :]))
    else:
        return {}
    return {out: v for out, v in carried if sources.get(v) and may_reuse(v)}


def _read_by_rows(flat: Flat, chip: Chip) -> set[int]:
    """What a loop with matmuls carries, and what rows are gathered from."""
    found = set[int]()
    for equation, inputs, _ in flat.operations:
        if equation.name == "scan":
            scan = scan_of(equation)
            if any(inner.equation.name == "dot_general" for inner in flatten(scan.body, chip.platform).operations):
                found.update(inputs[scan.num_consts : scan.first_xs])
        elif equation.name == "gather":
            found.update(inputs)
    return found


def _swaps_last_two(equation: Equation) -> bool:
    order = list(equation.params["permutation"]) if equation.name == "transpose" else []
    return bool(order) and order == [*range(len(order) - 2), len(order) - 1, len(order) - 2]


def _inside(operation: Operation, chip: Chip) -> int:
    """What one iteration of a loop, or a branch, needs."""
    if operation.name == "scan":
        scan = scan_of(operation.equation)
        in_place = {k: scan.num_consts + k for k in range(scan.num_carry)}
        return temporary_bytes(scan.body, in_place, range(scan.first_xs, len(scan.body.inputs)), chip=chip)
    if operation.name == "while":
        (body,) = operation.bodies
        first = len(body.inputs) - len(body.outputs)
        return temporary_bytes(body, {k: first + k for k in range(len(body.outputs))}, chip=chip)
    return max((temporary_bytes(branch, {}, chip=chip) for branch in operation.bodies), default=0)
