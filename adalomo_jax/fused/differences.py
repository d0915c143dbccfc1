"""Where two layers of a list first differ, in words: why one stack cannot hold both.

The words are of what the search for layers that repeat compares, in its order: equations by their signatures, then what
each of them reads.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from adalomo_jax.fused.jaxpr import Equation, Program, called_as_it_is, has_own_derivative, program_of
from adalomo_jax.fused.periods import Search
from adalomo_jax.fused.runs import Layers


class Leaf(NamedTuple):
    """A parameter, with what must be equal of those that one stack holds."""

    path: str
    value: int
    """Its number in the program."""
    type: str
    """Its dtype and shape."""
    trained: bool
    rule: Hashable
    """What ``tx`` does with it."""
    spread: str
    """Over devices."""

    @property
    def kind(self) -> Hashable:
        """What must be equal beside the type."""
        return (self.trained, self.rule, self.spread)


class Layer(NamedTuple):
    """A layer of a list: its leaves are read from one equation on, and the last of them first in another."""

    name: str
    first: int
    last: int


class Comparison(NamedTuple):
    """Of two layers."""

    alike: bool
    difference: str | None = None
    """None where it is not known."""


def of_leaves(x: Leaf, y: Leaf) -> str | None:
    """What keeps two leaves out of one stack by themselves; it is said of the first."""
    if x.type != y.type:
        return f"{x.path} is {x.type}, and {y.path} is {y.type}"
    if x.trained != y.trained:
        return f"{x.path} is {'' if x.trained else 'not '}trained, and {y.path} is{' not' if x.trained else ''}"
    if x.rule != y.rule:
        return f"{x.path} is treated otherwise by tx than {y.path}"
    return f"{x.path} is spread otherwise over devices than {y.path}" if x.spread != y.spread else None


@dataclass
class Differences:
    """The layers of a list, to be compared."""

    layers: Layers
    leaves: Mapping[int, Leaf]
    """By their numbers in the program."""
    of_list: Sequence[Layer]
    """In the order in which they are read."""

    def between(self, x: Layer, y: Layer) -> Comparison:
        """Whether two layers are alike, if the one is a period after the other; and if not, what is said of the first.

        The period is the distance between the equations that first read one of their leaves.
        """
        earlier, period, is_later = min(x, y, key=lambda layer: layer.first), abs(x.first - y.first), x.first > y.first
        codes = self.layers.codes
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
        """Of a layer beside a run, said of that: of two windows from here on it is the later or the earlier one."""
        codes = self.layers.codes
        if start < 0 or start + 2 * period > len(codes):
            return Comparison(False)
        differ = np.flatnonzero(codes[start : start + period] != codes[start + period : start + 2 * period])
        if len(differ):
            return self._of_equations(start + int(differ[0]), period, is_later)
        return self._within(start, period, is_later)

    def _within(self, start: int, period: int, is_later: bool) -> Comparison:
        """Of layers whose equations are alike: by what these read."""
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
        here, there = self._places(k, period, is_later)
        return f"{here} computes `{self.layers.ordered.equations[k].name}` of another value than {there}"

    def _of_equations(self, k: int, period: int, is_later: bool) -> Comparison:
        one, other = (self.layers.ordered.equations[at] for at in ((k + period, k) if is_later else (k, k + period)))
        here, there = self._places(k, period, is_later)
        program, signatures = self.layers.program, self.layers.signatures
        for (p, x), (q, y) in zip(_opened(program, one), _opened(program, other)):
            if x.name != y.name:
                return Comparison(False, f"{here} computes `{x.name}` where {there} computes `{y.name}`")
            if x.has_effects or y.has_effects:
                return Comparison(False, f"{here} computes `{x.name}`, which has effects")
            types = [" and ".join(a.avals[v].str_short() for v in e.inputs) for a, e in ((p, x), (q, y))]
            if types[0] != types[1]:
                return Comparison(False, f"{here} computes `{x.name}` of {types[0]}, and {there} of {types[1]}")
            if signatures.of(p, x) != signatures.of(q, y):
                return Comparison(False, f"{here} computes `{x.name}` with another {_parameter(x, y)} than {there}")
            both = [(v, w) for v, w in zip(x.inputs, y.inputs) if v in p.constants and w in q.constants]
            if p is not program and any(signatures.constant(p, v) != signatures.constant(q, w) for v, w in both):
                return Comparison(False, f"{here} computes `{x.name}` with another constant than {there}")
        names = " and ".join(dict.fromkeys(f"`{e.name}`" for _, e in _opened(program, one)))
        how = "with another derivative" if has_own_derivative(one) else "otherwise"
        return Comparison(False, f"{here} computes {names} {how} than {there}")

    def _places(self, k: int, period: int, is_later: bool) -> tuple[str, str]:
        """Where the equation is, and where the one that it is compared with."""
        first, second = self._place(k), self._place(k + period)
        return (second, first) if is_later else (first, second)

    def _place(self, k: int) -> str:
        for layer in self.of_list:
            if k <= layer.last:
                return layer.name if k >= layer.first else f"the loss before {layer.name}"
        return f"the loss after {self.of_list[-1].name}"


def _opened(program: Program, equation: Equation) -> Iterator[tuple[Program, Equation]]:
    """The equation, or those that it runs: of a checkpoint, of a function with a derivative of its own."""
    called = called_as_it_is(equation)
    if called is None:
        yield program, equation
        return
    inner = program_of(called)
    for e in inner.equations:
        yield from _opened(inner, e)


def _parameter(x: Equation, y: Equation) -> Any:
    """The name of the first parameter of a primitive that is printed otherwise."""
    of_both = x.params.keys() | y.params.keys()
    return next((f"`{name}`" for name in sorted(of_both) if str(x.params.get(name)) != str(y.params.get(name))), "way")
