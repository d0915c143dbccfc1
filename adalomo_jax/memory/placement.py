"""Where the buffers of a program lie on a chip, and what that takes of the chip's main memory.

Of a TPU, whose compiler places them in main memory or in the vector memory of a core:

- What a stretch of the program without loops makes and reads lies in the vector memory, while there is room; but not
  the result of a matmul that is written over an input.
- Where all arrays of a program have room there together, they lie there, those that loops carry too.
- Of two cores, each has a part in a matmul, a reduction or a scatter. The result goes to the main memory that they
  share, and from there into both vector memories before it is first read.
- Scalars lie in main memory, of which each buffer takes whole granules.
- An operation with several results has a table of them, one granule, for as long as the program runs. Such are:

  - loops, copies of arguments into vector memory, and what makes the two words of a random key;
  - reductions of one array, none of which needs another's result, which are one operation with what makes the array;
  - what makes the parts of a concatenation, and what makes a value that is written and also read by something else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import accumulate
from typing import NamedTuple

from adalomo_jax.fused.plan.jaxpr import Program
from adalomo_jax.memory.flat import LOOPS, WRITES, Flat, flatten, needed_whole

TPU_GRANULE = 16 * 2**10
"""Bytes, by which libtpu deals out main memory."""

_PASSING = ("reshape", "squeeze", "broadcast_in_dim", "select_n")
"""Through which a value is written."""


class Chip(NamedTuple):
    """What is to be known of a chip and its compiler."""

    platform: str = "cpu"
    """``"tpu"``, ``"cuda"`` or ``"cpu"``."""
    vector_bytes: int = 0
    """Of a TPU, the size of a core's vector memory, which is not counted; 0 where results do not go there."""
    cores: int = 1
    """Of a TPU, those that share its main memory."""
    granule: int = 1
    """Bytes of main memory, of which each buffer takes a whole number."""
    holds_all: bool = False
    """Whether the vector memory has room for all arrays of the program."""


ANY_CHIP = Chip()


class Lives(NamedTuple):
    """When the buffers of a program are there, by the places between its operations: place 0 is before the first."""

    spans: Mapping[int, tuple[int, int]]
    """Of each buffer the first and the last place at which it is there."""
    first_read: Mapping[int, int]
    """The place before the first operation that reads it."""
    pinned: Set[int]
    """Those that lie in main memory in any case."""


def most_alive(flat: Flat, lives: Lives, inner: Sequence[int], chip: Chip) -> int:
    """The most bytes of main memory in use at once.

    Args:
        flat: the program.
        lives: of its buffers.
        inner: at each place, what the operation that ends there needs inside.
        chip: where they lie.
    """
    begun, moved, ended = ([list[int]() for _ in inner] for _ in range(3))
    for v, (first, last) in lives.spans.items():
        begun[first].append(v)
        ended[min(last, len(inner) - 1)].append(v)
    vector = _in_vector_memory(flat, lives, chip)
    written_by_all = _written_by_all_cores(flat) if chip.cores > 1 else set[int]()
    taken = lambda v: -(-flat.sizes[v] // chip.granule) * chip.granule
    room, uncounted = chip.vector_bytes, set[int]()
    alive = most = 0
    for new, inside, copied, old in zip(begun, inner, moved, ended, strict=True):
        for v in new:
            if v in vector and (chip.holds_all or flat.sizes[v] <= room):
                uncounted.add(v)
                room -= flat.sizes[v]
                if v in written_by_all and not chip.holds_all:
                    alive += taken(v)
                    first_read, last = lives.first_read.get(v, len(inner)), lives.spans[v][1]
                    moved[min(first_read, last, len(inner) - 1)].append(v)
            else:
                alive += taken(v)
        most = max(most, alive + inside)
        alive -= sum(map(taken, copied))
        for v in old:
            room += flat.sizes[v] if v in uncounted else 0
            alive -= taken(v) if v not in uncounted else 0
    return most


def table_bytes(program: Program, chip: Chip) -> int:
    """What the tables of a program take: of the operations with several results, and of copies of arguments."""
    flat = flatten(program, chip.platform)
    arrays = set(flat.inputs).difference(flat.scalars)
    return (len(arrays) + _tables(flat, chip.platform)) * chip.granule


def _tables(flat: Flat, platform: str) -> int:
    """How many operations have several results; of branches the most."""
    needed = needed_whole(flat, is_tpu=True)
    count = sum(results > 1 for results in _results_of_reductions(flat, needed))
    count += len(_written_and_read(flat))
    for operation in flat.operations:
        count += operation.name in ("scan", "while")
        count += operation.name == "concatenate" and not flat.scalars.issuperset(operation.inputs)
        count += operation.name == "random_fold_in" and operation.outputs[0] not in needed
        count += max((_tables(flatten(body, platform), platform) for body in operation.bodies), default=0)
    return count


def _results_of_reductions(flat: Flat, needed: Set[int]) -> Iterator[int]:
    """Of each operation of joined reductions, how many results it has."""
    sources = {v: frozenset([v]) for v in flat.inputs}
    joined: dict[int, set[int]] = {}
    for operation in flat.operations:
        reads = frozenset[int]().union(*(sources.get(v, frozenset()) for v in operation.inputs))
        exists = lambda v, whole=operation.is_whole: whole or v in needed
        sources |= {v: frozenset([v]) if exists(v) else reads for v in operation.outputs}
        arrays = reads - flat.scalars
        if not operation.reduces or not arrays:
            continue
        largest = max(arrays, key=lambda v: flat.sizes[v])
        if largest not in joined:
            joined[largest] = {largest}.difference(flat.inputs)
        elif reads & (joined[largest] - {largest}):
            yield len(joined[largest])
            joined[largest] = set()
        joined[largest].update(operation.outputs)
    yield from map(len, joined.values())


def _written_and_read(flat: Flat) -> set[int]:
    """Of what is written into a stack or given back, the values that are also read by something else."""
    maker = {v: operation for operation in flat.operations for v in operation.outputs}
    readers = Counter(v for operation in flat.operations for v in operation.inputs) + Counter(flat.outputs)
    written = [*flat.outputs, *(o.inputs[1] for o in flat.operations if o.name == "dynamic_update_slice")]
    found = set[int]()
    while written:
        v = written.pop()
        if v not in maker or maker[v].is_whole or v in flat.scalars:
            continue
        if maker[v].name in _PASSING:
            written += maker[v].inputs if readers[v] == 1 else ()
        elif readers[v] > 1 and maker[v].name != "dynamic_slice":
            found.add(v)
    return found


def _in_vector_memory(flat: Flat, lives: Lives, chip: Chip) -> set[int]:
    """Buffers that lie in vector memory where there is room."""
    if not chip.vector_bytes:
        return set()
    if chip.holds_all:
        return set(lives.spans).difference(flat.scalars)
    # Loops and kernels read and write main memory.
    barriers = [operation.name in (*LOOPS, "pallas_call") for operation in flat.operations]
    before = list(accumulate([False, *barriers, False], initial=0))
    short = {v for v, (first, last) in lives.spans.items() if before[first] == before[last + 1]}
    return short.difference(lives.pinned, flat.scalars)


def _written_by_all_cores(flat: Flat) -> set[int]:
    wide = (o for o in flat.operations if o.reduces or o.name in ("dot_general", *WRITES))
    return {v for operation in wide for v in operation.outputs}
