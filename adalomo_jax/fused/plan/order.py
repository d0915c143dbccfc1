"""Orders a program's equations so that layers of a list are contiguous; those that pick one of several come first."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

from adalomo_jax.fused.plan.equation_signatures import Signatures
from adalomo_jax.fused.plan.jaxpr import Equation, Program

_FEW = 3
"""A value made from parameters alone, and read at most this many times, belongs to one layer."""


class Pick(NamedTuple):
    """One entry along an axis of an array."""

    source: int
    axis: int
    index: int


class Ordered(NamedTuple):
    """A program's equations, in another order: it computes the same."""

    first: tuple[Equation, ...]
    """The equations that make picks, and those that these need."""
    equations: tuple[Equation, ...]
    """The others. Those that compute from parameters alone stand before the readers of their results."""
    picks: dict[int, Pick]
    """Picks of parameters, and of values that depend on none, such as keys and masks."""
    same: dict[int, int]
    """For each value that `first` makes, the first one that is computed alike."""
    of_leaves: frozenset[int]
    """Values that are computed from parameters alone."""


def in_order(
    program: Program, leaves: Sequence[int], signatures: Signatures, pickable: Collection[int] | None = None
) -> Ordered:
    """Orders the program. Entries are picked from the pickable leaves only, by default from all."""
    depends = _depending(program, leaves)
    picks, picking = _picks(program, set(leaves if pickable is None else pickable), depends)
    needed, first = {pick.source for pick in picks.values()}, set(picking)
    for k in reversed(range(len(program.equations))):
        equation = program.equations[k]
        if needed.intersection(equation.outputs) and not equation.has_effects:
            needed.update(equation.inputs)
            first.add(k)
    at_first = [program.equations[k] for k in sorted(first)]
    others = [equation for k, equation in enumerate(program.equations) if k not in first]
    of_leaves = _of_leaves_alone(program, others, {*leaves, *picks, *program.constants})
    return Ordered(
        tuple(at_first),
        tuple(_sunk(program, others, of_leaves)),
        picks,
        _same(program, at_first, picks, signatures),
        frozenset(of_leaves),
    )


def picks_layers(program: Program, leaves: Sequence[int]) -> bool:
    """Whether the program reads single entries of a parameter."""
    return any(pick.source in leaves for pick in _picks(program, leaves, leaves)[0].values())


def with_layers_as_inputs(program: Program, layers: Sequence[int | None]) -> tuple[Program, list[int]]:
    """The program with the stacks among its first inputs replaced by their layers, and the numbers of these inputs.

    Args:
      program: reads only single layers of a stack, along the first axis.
      layers: the number of layers of each parameter, in the order of the inputs; None if it is no stack.
    """
    stacks = {v for v, n in zip(program.inputs, layers) if n is not None}
    picks, _ = _picks(program, stacks, stacks)
    made = {(pick.source, pick.index): v for v, pick in picks.items() if pick.axis == 0}
    avals, inputs = list(program.avals), []
    for v, n in zip(program.inputs, layers):
        for i in [None] if n is None else range(n):
            if i is not None and (v, i) not in made:  # the loss does not read it
                made[v, i] = len(avals)
                avals.append(program.avals[v].update(shape=program.avals[v].shape[1:], sharding=None))
            inputs.append(v if i is None else made[v, i])
    equations = tuple(e for e in program.equations if not {*e.outputs} & {*inputs} and not {*e.inputs} & stacks)
    rest = program.inputs[len(layers) :]
    return Program((*inputs, *rest), program.outputs, equations, program.constants, avals), inputs


def _depending(program: Program, leaves: Sequence[int]) -> set[int]:
    depends = set(leaves)
    for equation in program.equations:
        if depends.intersection(equation.inputs):
            depends.update(equation.outputs)
    return depends


def _picks(program: Program, leaves: Collection[int], depends: Collection[int]) -> tuple[dict[int, Pick], list[int]]:
    """The picks, and the positions of the equations that make them."""
    slices: dict[int, tuple[Pick, int]] = {}
    picks: dict[int, Pick] = {}
    positions: list[int] = []
    for k, equation in enumerate(program.equations):
        source = equation.inputs[0] if equation.inputs else None
        if equation.name == "squeeze" and source in slices:
            pick, at = slices[source]
            if tuple(equation.params["dimensions"]) == (pick.axis,):
                picks[equation.outputs[0]] = pick
                positions += [at, k]
        if source is None or (source in depends and source not in leaves):
            continue
        if equation.name == "slice" and (pick := _sliced(program, equation)) is not None:
            slices[equation.outputs[0]] = (pick, k)
        if equation.name == "unstack":
            picks |= {v: Pick(source, equation.params["axis"], i) for i, v in enumerate(equation.outputs)}
            positions.append(k)
    return picks, positions


def _sliced(program: Program, equation: Equation) -> Pick | None:
    params, shape = equation.params, program.avals[equation.inputs[0]].shape
    starts, stops = params["start_indices"], params["limit_indices"]
    cut = [a for a, size in enumerate(shape) if (starts[a], stops[a]) != (0, size)]
    if not cut:  # the slice is of an axis of size 1
        cut = [a for a, size in enumerate(shape) if size == 1][:1]
    if len(cut) != 1 or stops[cut[0]] - starts[cut[0]] != 1 or any(n != 1 for n in params["strides"] or ()):
        return None
    return Pick(equation.inputs[0], cut[0], starts[cut[0]])


def _of_leaves_alone(program: Program, equations: Sequence[Equation], known: set[int]) -> set[int]:
    """The values computed from known values without effects; not the known values."""
    made = set()
    for equation in equations:
        if equation.inputs and not equation.has_effects and all(v in known or v in made for v in equation.inputs):
            if any(v in made or v not in program.constants for v in equation.inputs):
                made.update(equation.outputs)
    return made


def _sunk(program: Program, equations: Sequence[Equation], of_leaves: Collection[int]) -> list[Equation]:
    """The equations, with those of parameters alone moved to just before their first readers."""
    readers = defaultdict(int)
    for v in (*program.outputs, *(v for equation in equations for v in set(equation.inputs))):
        readers[v] += 1
    sinks = lambda e: all(v in of_leaves and readers[v] <= _FEW for v in e.outputs) and bool(e.outputs)
    maker = {v: equation for equation in equations if sinks(equation) for v in equation.outputs}
    done: set[int] = set()
    ordered: list[Equation] = []

    def emit(equation: Equation) -> None:
        if id(equation) not in done:
            done.add(id(equation))
            for v in equation.inputs:
                if v in maker:
                    emit(maker[v])
            ordered.append(equation)

    for equation in equations:
        if not sinks(equation):
            emit(equation)
    for v in program.outputs:
        if v in maker:
            emit(maker[v])
    return ordered


def _same(
    program: Program, equations: Sequence[Equation], picks: dict[int, Pick], signatures: Signatures
) -> dict[int, int]:
    same: dict[int, int] = {}
    first: dict[tuple, tuple[int, ...]] = {}
    for equation in equations:
        inputs = tuple(
            same.get(v, v) if v not in program.constants else -1 - signatures.constant(program, v)
            for v in equation.inputs
        )
        made = first.setdefault((signatures.of(program, equation), inputs), equation.outputs)
        same |= zip(equation.outputs, made)
    return same
