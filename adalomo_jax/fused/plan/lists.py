"""Lists of layers, known by the paths of their leaves: which period was stacked, and why a leaf was not."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from adalomo_jax.fused.plan.differences import Comparison, Differences, Layer, Leaf, of_leaves
from adalomo_jax.fused.plan.repeats import Found, Repeat
from adalomo_jax.fused.plan.runs import FEWEST, Layers

_NUMBER = re.compile(r"(?:^|(?<=[/_]))\d+(?=/|$)")
"""The number of a layer in a path: ``layers/3/up``, ``layers_3/up``."""


class Lists(NamedTuple):
    """What is known of a loss's lists of layers."""

    repeats: Sequence[Repeat] = ()
    """The repeats that `place` would stack, and has not."""
    too_few: Sequence[Repeat] = ()
    """The repeats that it would not stack, since they have too few layers to gain by it."""
    reasons: Sequence[str | None] = ()
    """Why each parameter of a list is not stacked; None if the reason is not known, or for any other parameter."""


class _Place(NamedTuple):
    """The place of a leaf in a list: the path's part before the number, the number, and the part after it."""

    before: str
    number: int
    after: str

    @property
    def list_and_leaf(self) -> tuple[str, str]:
        return self.before, self.after


def period_of(paths: Sequence[str]) -> int | None:
    """How many layers apart in a list the leaves at these paths are; None if they are not evenly spaced."""
    for places in zip(*map(_places, paths)):
        steps = {b.number - a.number for a, b in zip(places, places[1:])}
        if len({place.list_and_leaf for place in places}) == 1 and len(steps) == 1:
            return steps.pop()
    return None


def nth(n: int) -> str:
    """An ordinal: 1st, 2nd, 11th."""
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def why_not_stacked(found: Found, leaves: Sequence[Leaf], stacked: Collection[int]) -> list[str | None]:
    """Why each leaf is not stacked, except those at the ``stacked`` positions; None for a leaf that is in no list.

    Args:
      found: what repeats in a loss that reads each layer by itself.
      leaves: the loss's parameters.
      stacked: positions among these. If the search does not find them, nothing is said of their list.
    """
    places = _places_in_lists(leaves)
    reasons: list[str | None] = [None] * len(leaves)
    for before in {place.before for place in places.values()}:
        of_list = _List(found, leaves, {i: place for i, place in places.items() if place.before == before})
        if not any(i in of_list.places and i not in of_list.run_of for i in stacked):
            for i in of_list.places.keys() - of_list.run_of.keys():
                reasons[i] = _of_itself(of_list.why(i), leaves[i].path)
            for i in of_list.run_of.keys() - set(stacked):
                reasons[i] = f"it is one of {of_list.run_of[i].layers} layers in a list that repeat"
    return reasons


def _of_itself(reason: str | None, path: str) -> str | None:
    """The reason, worded to stand beside the path."""
    return f"it{reason[len(path) :]}" if reason and reason.startswith(f"{path} ") else reason


class _List:
    """A list of layers."""

    def __init__(self, found: Found, leaves: Sequence[Leaf], places: Mapping[int, _Place]):
        self.leaves, self.places = leaves, places
        self.readers, self.first_use = found.layers.readers, found.layers.first_use
        self.at = {(place.number, place.after): i for i, place in places.items()}
        self.numbers = sorted({place.number for place in places.values()})
        self.run_of: dict[int, Repeat] = {}
        """The run that holds each leaf, by the leaf's position."""
        position = {leaf.value: i for i, leaf in enumerate(leaves)}
        for repeat in found.repeats:
            of_stacks = [v for scanned in repeat.scanned if scanned.is_parameter for v in scanned.values]
            self.run_of |= {position[v]: repeat for v in of_stacks if position.get(v) in places}
        self.layers = self._layers(found.layers)
        in_order = sorted(self.layers.values(), key=lambda layer: layer.first)
        self.differences = Differences(found.layers, {leaf.value: leaf for leaf in leaves}, in_order)

    def _layers(self, found: Layers) -> dict[int, Layer]:
        """The layers that are used, by their numbers."""
        uses: dict[int, list[int]] = defaultdict(list)
        for i, place in self.places.items():
            if self.leaves[i].value in self.readers:
                uses[place.number].append(found.first_use(self.leaves[i].value))
        name = next(iter(self.places.values())).before
        return {n: Layer(f"{name}{n}", min(at), max(at)) for n, at in uses.items() if 0 <= min(at) < len(found.codes)}

    def why(self, i: int) -> str | None:
        """Why a leaf is in no stack."""
        if self.places[i].number not in self.layers:
            return None
        beside = self._beside_run(i)
        if isinstance(beside, str):
            return beside
        alike = self._alike(i)
        if 1 < alike < FEWEST:
            return f"only {alike} layers in a row are alike"
        found = [beside] if beside is not None else []
        found += [self._compare(i, other) for step in (-1, 1) if (other := self._neighbour(i, step)) is not None]
        if any(comparison.alike for comparison in found):
            return None  # the search had another reason
        return next((comparison.difference for comparison in found if comparison.difference), None)

    def _beside_run(self, i: int) -> Comparison | str | None:
        """Compares a leaf beside layers that repeat with its counterpart one period further, or says the reason.

        None if it is not beside any, or is within them.
        """
        n, after = self.places[i].number, self.places[i].after
        of_runs = [j for j in self.run_of if self.places[j].after == after]
        if not of_runs:
            return None
        nearest = min(of_runs, key=lambda j: abs(self.places[j].number - n))
        run = self.run_of[nearest]
        like = sorted(self.places[j].number for j in of_runs if self.run_of[j] is run)
        covered = [self.places[j].number for j in self.run_of if self.run_of[j] is run]
        period = self._period(run)
        first, last = min(covered), max(covered)
        if period is None or first < n < last:
            return None
        others = [self.places[j].number for j in self.run_of if self.run_of[j] is not run]
        sides = [k for k in self.numbers if (k > last if n > last else k < first)]
        left = [k for k in sides if not any(min(k, n) <= other <= max(k, n) for other in others)]
        if len(left) < period:
            is_one = len(left) == 1
            return f"{len(left)} layer{' is' if is_one else 's are'} left over by a period of {period}"
        step = -period if n > last else period
        other = self.at.get((n + step, after))
        if n + step not in like or other is None:
            return None
        if (difference := of_leaves(self.leaves[i], self.leaves[other])) is not None:
            return Comparison(False, difference)
        start = run.stop - run.period if n > last else run.start - run.period
        window = range(run.stop, run.stop + run.period) if n > last else range(start, run.start)
        if start < 0 or self.first_use(self.leaves[i].value) not in window:
            return self._compare(i, other)
        return self.differences.beside(start, run.period, is_later=n > last)

    def _period(self, run: Repeat) -> int | None:
        """How many layers of this list make up one layer of the run."""
        position = {self.leaves[i].value: i for i in self.run_of}
        of_stacks = [[position[v] for v in s.values] for s in run.scanned if all(v in position for v in s.values)]
        periods = {period_of([self.leaves[i].path for i in stack]) for stack in of_stacks}
        return periods.pop() if len(periods) == 1 else None

    def _alike(self, i: int) -> int:
        """How many layers in a row, including the leaf's own, are alike and in no stack."""
        count = 1
        for step in (-1, 1):
            at = i
            while (other := self._neighbour(at, step)) is not None and self._compare(at, other).alike:
                at, count = other, count + 1
        return count

    def _neighbour(self, i: int, step: int) -> int | None:
        """The same leaf of the layer before or after, if it is in no stack."""
        n, after = self.places[i].number, self.places[i].after
        beyond = [k for k in self.numbers if (k - n) * step > 0 and (k, after) in self.at and k in self.layers]
        other = self.at[min(beyond, key=lambda k: abs(k - n)), after] if beyond else None
        return None if other in self.run_of else other

    def _compare(self, i: int, other: int) -> Comparison:
        if (difference := of_leaves(self.leaves[i], self.leaves[other])) is not None:
            return Comparison(False, difference)
        x, y = (self.layers[self.places[k].number] for k in (i, other))
        return self.differences.between(x, y)


def _places(path: str) -> list[_Place]:
    """The places that a leaf may have in lists, the outermost list first."""
    found = _NUMBER.finditer(path)
    return [_Place(path[: match.start()], int(match.group()), path[match.end() :]) for match in found]


def _places_in_lists(leaves: Sequence[Leaf]) -> dict[int, _Place]:
    """The place of each leaf with a counterpart in a list of layers: in the longest list, if there are several.

    A list of arrays is a list of layers only if all are of one type: Keras keeps all arrays of a model in one list.
    """
    members: dict[tuple[str, str], list[str]] = defaultdict(list)
    for leaf in leaves:
        for place in _places(leaf.path):
            members[place.list_and_leaf].append(leaf.type)

    def is_of_layers(place: _Place) -> bool:
        types = members[place.list_and_leaf]
        return len(set(types)) < len(types) and (place.after != "" or len(set(types)) == 1)

    of_leaves = ((i, list(filter(is_of_layers, _places(leaf.path)))) for i, leaf in enumerate(leaves))
    return {i: max(of, key=lambda place: len(members[place.list_and_leaf])) for i, of in of_leaves if of}
