"""Where two layers of a list first differ, in words: why one stack cannot hold both.

The words describe what the search for repeating layers compares, in its order: equations by their signatures, then the
values that each of them reads.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from adalomo_jax.fused.plan.equation_signatures import Signatures
from adalomo_jax.fused.plan.jaxpr import (
    Equation,
    Program,
    called_as_it_is,
    has_own_derivative,
    is_checkpoint,
    program_of,
)
from adalomo_jax.fused.plan.periods import Search
from adalomo_jax.fused.plan.runs import FEWEST, Layers


class Leaf(NamedTuple):
    """A parameter, with the properties that must be equal in all leaves of one stack."""

    path: str
    value: int
    """Its number in the program."""
    type: str
    """Its dtype and shape."""
    trained: bool
    rule: Hashable
    """What ``tx`` does with it."""
    spread: str
    """How it is spread over devices."""
    form: str = ""
    """The form in which it is kept, if it is not an array."""

    @property
    def kind(self) -> Hashable:
        """The properties that must be equal besides the type."""
        return (self.trained, self.rule, self.spread, self.form)


class Layer(NamedTuple):
    """A layer of a list: from the equation that first uses one of its leaves to the one that first uses the last."""

    name: str
    first: int
    last: int


class Comparison(NamedTuple):
    """How two layers compare."""

    alike: bool
    difference: str | None = None
    """None if it is not known."""


def of_leaves(x: Leaf, y: Leaf) -> str | None:
    """The difference that by itself keeps two leaves out of one stack, said of the first."""
    if x.type != y.type:
        return f"{x.path} is {x.type}, and {y.path} is {y.type}"
    if x.trained != y.trained:
        return f"{x.path} is {'' if x.trained else 'not '}trained, and {y.path} is{' not' if x.trained else ''}"
    if x.rule != y.rule:
        return f"{x.path} is treated differently by tx than {y.path}"
    if x.form != y.form:
        return f"{x.path} is kept as {x.form or 'floats'}, and {y.path} as {y.form or 'floats'}"
    return f"{x.path} is sharded differently than {y.path}" if x.spread != y.spread else None


@dataclass
class Differences:
    """The layers of a list, to be compared."""

    layers: Layers
    leaves: Mapping[int, Leaf]
    """By their numbers in the program."""
    of_list: Sequence[Layer]
    """In the order in which they are read."""

    def between(self, x: Layer, y: Layer) -> Comparison:
        """Whether two layers are alike, if one is a period after the other; if not, how the first differs.

        The period is the distance between the equations that first read one of their leaves.
        """
        earlier, period, is_later = min(x, y, key=lambda layer: layer.first), abs(x.first - y.first), x.first > y.first
        codes = self.layers.codes
        if not period and is_checkpoint(self.layers.ordered.equations[x.first]):
            few = f"fewer than {FEWEST} layers repeat inside it"
            return Comparison(False, f"one checkpoint runs {x.name} and {y.name}, and {few}")
        if not 0 < period < len(codes):
            return Comparison(False)
        differ = np.flatnonzero(codes[period:] != codes[:-period])
        before = int(max(differ[differ < earlier.first], default=-1))
        after = int(min(differ[differ >= earlier.first], default=len(codes) - period))
        if after <= earlier.last:
            return self._of_equations(after, period, is_later) if after + period < len(codes) else Comparison(False)
        begin, end = max(before, earlier.last - period) + 1, min(after, earlier.first + period)
        if end - begin >= period:
            cuts = Search(self.layers).cuts(period, begin, end + period)
            found = [self._within(start, period, is_later) for start in cuts]
            return next((comparison for comparison in found if comparison.alike), found[0])
        return self._of_equations(before, period, is_later) if before >= 0 else Comparison(False)

    def beside(self, start: int, period: int, *, is_later: bool) -> Comparison:
        """Says how a layer beside a run differs: the later or the earlier one of the two windows from `start` on."""
        codes = self.layers.codes
        if start < 0 or start + 2 * period > len(codes):
            return Comparison(False)
        differ = np.flatnonzero(codes[start : start + period] != codes[start + period : start + 2 * period])
        if len(differ):
            return self._of_equations(start + int(differ[0]), period, is_later, start)
        found = self._within(start, period, is_later)
        if not found.alike:
            return found
        in_run = self.layers.first_two(start - period if is_later else start + period, period)
        for (k, *_, role), (*_, usual) in zip(self.layers.first_two(start, period), in_run):
            if role != usual and {"made", "carried"} & {of[0] for of in (role, usual) if of}:
                here, there = self._places(k, period, is_later, start)
                name = _name(self.layers.ordered.equations[k])
                return Comparison(False, f"{here} computes {name} of another value than {there}")
        return found

    def _within(self, start: int, period: int, is_later: bool) -> Comparison:
        """Compares layers whose equations are alike, by what these read."""
        for k, v, w, role in self.layers.first_two(start, period):
            if role is None:
                return Comparison(False, self._of_inputs(k, period, (v, w), start, is_later))
        return Comparison(True)

    def _of_inputs(self, k: int, period: int, inputs: tuple[int, int], start: int, is_later: bool) -> str:
        x, y = (self.leaves.get(v) for v in (reversed(inputs) if is_later else inputs))
        if x is not None and y is not None and (difference := of_leaves(x, y)):
            return difference
        for v, begin in zip(inputs, (start, start + period)):
            if v in self.leaves and not self.layers.may_be_scanned(v, begin, period):
                return f"{self.leaves[v].path} is read elsewhere, too"
        here, there = self._places(k, period, is_later, start)
        return f"{here} computes {_name(self.layers.ordered.equations[k])} of another value than {there}"

    def _of_equations(self, k: int, period: int, is_later: bool, start: int | None = None) -> Comparison:
        one, other = (self.layers.ordered.equations[at] for at in ((k + period, k) if is_later else (k, k + period)))
        here, there = self._places(k, period, is_later, start)
        program, signatures = self.layers.program, self.layers.signatures
        what, how = _told_apart(signatures, (program, one), (program, other)) or (_name(one), "differently")
        if how.startswith("`"):  # another operation
            return Comparison(False, f"{here} computes {what}, but {there} computes {how}")
        return Comparison(False, f"{here} computes {what} {how} than {there}")

    def _places(self, k: int, period: int, is_later: bool, start: int | None) -> tuple[str, str]:
        """Where the equation is, and where the one compared with it is; in layers that begin at `start`, if known."""
        first = self._place(k, start, period)
        second = self._place(k + period, None if start is None else start + period, period)
        return (second, first) if is_later else (first, second)

    def _place(self, k: int, start: int | None, period: int) -> str:
        within = [] if start is None else [x for x in self.of_list if start <= x.first < start + period]
        if within:
            return next((layer for layer in reversed(within) if layer.first <= k), within[0]).name
        for layer in self.of_list:
            if k <= layer.last:
                return layer.name if k >= layer.first else f"the loss before {layer.name}"
        return f"the loss after {self.of_list[-1].name}"


_Within = tuple[Program, Equation]
"""An equation of a program."""


def _told_apart(signatures: Signatures, one: _Within, other: _Within) -> tuple[str, str] | None:
    """What an equation computes, and how it differs, or what the other computes; None if they are not told apart.

    If the equations run others, this describes the first of those that differ.
    """
    (p, x), (q, y) = one, other
    within, within_other = _run_by(*one), _run_by(*other)
    if within is None or within_other is None:
        names = [_names(within or [one]), _names(within_other or [other])]
        differ = [(a, b) for a, b in zip(*names) if a != b]
        return differ[0] if differ else None if within or within_other else _operations_apart(signatures, one, other)
    for a, b in zip(within, within_other):
        if (apart := _told_apart(signatures, a, b)) is not None:
            return apart
    if has_own_derivative(x) and has_own_derivative(y) and signatures.of(p, x) != signatures.of(q, y):
        return _names(within)[0], "with another derivative"
    return None


def _operations_apart(signatures: Signatures, one: _Within, other: _Within) -> tuple[str, str] | None:
    """Tells apart equations of the same name that run no others."""
    (p, x), (q, y) = one, other
    of_types = [" and ".join(program.avals[v].str_short() for v in e.inputs) for program, e in (one, other)]
    if of_types[0] != of_types[1]:
        return f"{_name(x)} of {of_types[0]}", f"{_name(y)} of {of_types[1]}"
    if signatures.of(p, x) != signatures.of(q, y):
        names = sorted(x.params.keys() | y.params.keys())
        unequal = [name for name in names if str(x.params.get(name)) != str(y.params.get(name))]
        return _name(x), f"with another `{unequal[0]}`" if unequal else "differently"
    of_both = [(v, w) for v, w in zip(x.inputs, y.inputs) if v in p.constants and w in q.constants]
    if any(signatures.constant(p, v) != signatures.constant(q, w) for v, w in of_both):
        return _name(x), "with another constant"
    return None


def _run_by(program: Program, equation: Equation) -> list[_Within] | None:
    """The equations that a checkpoint, or a function with its own derivative, runs; None if it runs nothing."""
    called = called_as_it_is(equation)
    if called is None:
        return None
    inner = program_of(called)
    return [(inner, e) for e in inner.equations] or None


def _names(equations: Sequence[_Within]) -> list[str]:
    """The names of the operations, in order."""
    inner = ((e, _run_by(program, e)) for program, e in equations)
    return [name for e, within in inner for name in (_names(within) if within else [_name(e)])]


def _name(equation: Equation) -> str:
    return "`checkpoint`" if is_checkpoint(equation) else f"`{equation.name}`"
