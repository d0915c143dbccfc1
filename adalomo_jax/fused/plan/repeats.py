"""Finds equations that repeat, layer after layer, as a Python loop over a list of layers leaves them in a program.

The search goes by structure: in a run, each equation is like the one a period before it. A value that a layer reads was
made in that layer, or by the layer before at the same place (carried), or before the run. In the last case it is the
same for each layer, or each layer has its own. The search looks for runs whose layers have their own parameters.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from adalomo_jax.fused.plan.equation_signatures import Signatures
from adalomo_jax.fused.plan.folded_keys import with_folded_as_operands
from adalomo_jax.fused.plan.jaxpr import Equation, Program, called_by, is_checkpoint, with_opened
from adalomo_jax.fused.plan.order import Ordered, in_order
from adalomo_jax.fused.plan.periods import Search
from adalomo_jax.fused.plan.runs import Layers, Parameter, Run, nbytes


class Carried(NamedTuple):
    """A value that each layer receives from the one before."""

    initial: int
    """What the first layer receives."""
    received: int
    """Its number in the layer."""
    made: int
    """The number, in the layer, of the value that the next one receives."""


class Scanned(NamedTuple):
    """Values that differ from layer to layer."""

    values: tuple[int, ...]
    """In the order of the layers."""
    received: int
    """Their number in the layer."""
    is_parameter: bool


class Read(NamedTuple):
    """A value that a layer makes and something after the run reads."""

    value: int
    layer: int
    made: int
    """Its number in the layer."""


@dataclass(frozen=True, eq=False)
class Repeat:
    """A run of equations that is one layer, repeated."""

    start: int
    """The position of its first equation."""
    period: int
    """How many equations a layer has."""
    layers: int
    layer: tuple[Equation, ...]
    """The first layer's equations; the values that they receive have their own numbers."""
    carried: tuple[Carried, ...]
    scanned: tuple[Scanned, ...]
    read: tuple[Read, ...]

    @property
    def stop(self) -> int:
        """The position after its last equation."""
        return self.start + self.period * self.layers


class Found(NamedTuple):
    """A program, and what repeats in it."""

    layers: Layers
    repeats: list[Repeat]

    @property
    def program(self) -> Program:
        """The program that was searched, with checkpoints around loops opened, and checkpoints given constants."""
        return self.layers.program

    @property
    def ordered(self) -> Ordered:
        """The program's equations."""
        return self.layers.ordered


def find_repeats(program: Program, leaves: Sequence[int], kinds: Sequence[Hashable]) -> Found:
    """The program's equations in an order in which layers are contiguous, and the runs among them that repeat.

    Args:
      program: a loss.
      leaves: its parameters.
      kinds: the kind of each: equal if one stack may hold them, None if no stack may. Picks of a parameter always may.
    """
    program = with_folded_as_operands(program)
    found = _find(program, leaves, kinds, leaves)
    in_parts = _in_parts(found, {v for v, kind in zip(leaves, kinds, strict=True) if kind is not None})
    if not in_parts:
        return found
    as_wholes = _find(program, leaves, kinds, [v for v in leaves if v not in in_parts])
    return max(found, as_wholes, key=_stacked)


def _in_parts(found: Found, leaves: Collection[int]) -> set[int]:
    """The leaves of which a single entry is read, but not as a layer: one layer's own, such as a bias with two rows."""
    picks = found.ordered.picks
    scanned = {v for repeat in found.repeats for scanned in repeat.scanned for v in scanned.values}
    return {pick.source for pick in picks.values() if pick.source in leaves} - {
        picks[v].source for v in scanned.intersection(picks)
    }


def _find(program: Program, leaves: Sequence[int], kinds: Sequence[Hashable], pickable: Collection[int]) -> Found:
    """Finds what repeats, if a single entry of a pickable leaf may be a layer, and no part of another leaf may."""
    signatures = Signatures()
    ordered = in_order(program, leaves, signatures, pickable)
    kind_of = {v: kind for v, kind in zip(leaves, kinds, strict=True) if kind is not None}
    of_picks = {v: ("layer of", pick.source) for v, pick in ordered.picks.items() if pick.source in leaves}
    parameters = {
        v: Parameter((kind, str(program.avals[v])), nbytes(program, v)) for v, kind in (kind_of | of_picks).items()
    }
    layers = Layers(program, ordered, frozenset(leaves), parameters, signatures)
    repeats = [_repeat(layers, run) for run in Search(layers).runs(0, len(ordered.equations))]
    found = Found(layers, repeats)
    loops = [e for e in _outside(ordered, repeats) if is_checkpoint(e) and _is_loop(e, program, ordered, parameters)]
    if not loops:
        return found
    opened = find_repeats(with_opened(program, loops), leaves, kinds)
    return opened if _stacked(opened) > _stacked(found) else found


def _stacked(found: Found) -> int:
    """How many parameters are layers of stacks."""
    of_stacks = [scanned for repeat in found.repeats for scanned in repeat.scanned if scanned.is_parameter]
    return sum(len(scanned.values) for scanned in of_stacks)


def _outside(ordered: Ordered, repeats: Sequence[Repeat]) -> list[Equation]:
    inside = {k for repeat in repeats for k in range(repeat.start, repeat.stop)}
    return [equation for k, equation in enumerate(ordered.equations) if k not in inside]


def _is_loop(checkpoint: Equation, program: Program, ordered: Ordered, parameters: Mapping[int, Parameter]) -> bool:
    """Whether layers repeat in it that read parameters, or values made from parameters alone, such as casts."""
    of_leaves = {v: ("of leaves", str(program.avals[v])) for v in checkpoint.inputs if v in ordered.of_leaves}
    kinds = [parameters[v].kind if v in parameters else of_leaves.get(v) for v in checkpoint.inputs]
    known = [kind for kind in kinds if kind is not None]
    if len(set(known)) == len(known):
        return False
    within = called_by(checkpoint)
    return bool(find_repeats(within, within.inputs, kinds).repeats)


def _repeat(of: Layers, run: Run) -> Repeat:
    """Describes a run, with numbers for the values that a layer receives."""
    numbers: dict[Any, int] = {}
    number = lambda key: numbers.setdefault(key, len(of.program.avals) + len(numbers))
    carried, scanned, inputs = {}, {}, []
    equations = of.ordered.equations
    for role, values in zip(run.roles, run.values):
        if role[0] == "carried":
            key = (values[0], role)
            carried[key] = Carried(values[0], number(key), equations[run.start + role[1]].outputs[role[2]])
            inputs.append(carried[key].received)
        elif role[0] == "scanned":
            key = tuple(values)
            scanned[key] = Scanned(key, number(key), values[0] in of.parameters)
            inputs.append(scanned[key].received)
        else:
            inputs.append(values[0])
    layer, rest = [], iter(inputs)
    for equation in equations[run.start : run.start + run.period]:
        layer.append(equation._replace(inputs=tuple(next(rest) for _ in equation.inputs)))
    return Repeat(
        start=run.start,
        period=run.period,
        layers=run.layers,
        layer=tuple(layer),
        carried=tuple(carried.values()),
        scanned=tuple(scanned.values()),
        read=tuple(_read_after(of, run)),
    )


def _read_after(of: Layers, run: Run) -> Iterator[Read]:
    stop = run.start + run.period * run.layers
    for k in range(run.start, stop):
        layer, offset = divmod(k - run.start, run.period)
        for output, v in enumerate(of.ordered.equations[k].outputs):
            if any(reader >= stop for reader in of.readers.get(v, ())):
                yield Read(v, layer, of.ordered.equations[run.start + offset].outputs[output])
