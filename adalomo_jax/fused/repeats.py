"""Equations that repeat, layer after layer, as a loop in Python over a list of layers leaves them in a program.

Found by structure: a run of equations, of which each is like the one that stands a period before it. What a layer reads
it makes itself, or it is what the layer before made at the same place (carried), or it was there before the run: the
same for each layer, or for each another. Parameters that are others for each layer are what such a run is looked for.
"""

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from adalomo_jax.fused.folded_keys import with_folded_as_operands
from adalomo_jax.fused.jaxpr import Equation, Program, called_by, is_checkpoint, with_opened
from adalomo_jax.fused.order import Ordered, in_order
from adalomo_jax.fused.signatures import Signatures

_CUTS = 8
"""So many places to cut a period are tried: those at which the least is handed from a layer to the next."""

_FEWEST = 3
"""So many layers of a list are stacked. Of two, one is copied whenever it is read from the stack: nothing is gained."""


class Parameter(NamedTuple):
    """A value that may be one layer's share of a stack: a parameter, or one layer of a parameter that is a stack."""

    kind: Hashable
    """Equal for those that one stack can hold."""
    nbytes: int


class Carried(NamedTuple):
    """A value that each layer receives of the one before."""

    initial: int
    """What the first layer receives."""
    received: int
    """Its number in the layer."""
    made: int
    """The number in the layer of what the next one receives."""


class Scanned(NamedTuple):
    """Values that are others for each layer."""

    values: tuple[int, ...]
    """In the order of the layers."""
    received: int
    """Their number in the layer."""
    is_parameter: bool


class Read(NamedTuple):
    """What a layer makes and something after the run reads."""

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
    """The first layer's equations; what they receive has numbers of its own."""
    carried: tuple[Carried, ...]
    scanned: tuple[Scanned, ...]
    read: tuple[Read, ...]

    @property
    def stop(self) -> int:
        """The position after its last equation."""
        return self.start + self.period * self.layers


@dataclass
class _Run:
    """A run as it is found: of each input of a layer's equations, in their order, where it comes from."""

    start: int
    period: int
    layers: int
    roles: list[tuple[Any, ...]]
    values: list[list[int]]
    """Of each input, of each layer the value."""


class Found(NamedTuple):
    """A program, and what repeats in it."""

    program: Program
    """The one that was searched, but a checkpoint around a loop is opened, and checkpoints are given constants."""
    ordered: Ordered
    repeats: list[Repeat]


def find_repeats(program: Program, leaves: Sequence[int], kinds: Sequence[Hashable]) -> Found:
    """The program's equations in an order in which layers are contiguous, and the runs among them that repeat.

    Args:
      program: a loss.
      leaves: its parameters.
      kinds: of each; equal for those that one stack may hold, None where none may. Picks of a parameter always may.
    """
    program = with_folded_as_operands(program)
    found = _find(program, leaves, kinds, leaves)
    in_parts = _in_parts(found, {v for v, kind in zip(leaves, kinds, strict=True) if kind is not None})
    if not in_parts:
        return found
    as_wholes = _find(program, leaves, kinds, [v for v in leaves if v not in in_parts])
    return max(found, as_wholes, key=_stacked)


def _in_parts(found: Found, leaves: Collection[int]) -> set[int]:
    """The leaves of which a single entry is read, but not as a layer: a layer's own, such as a bias with two rows."""
    picks = found.ordered.picks
    scanned = {v for repeat in found.repeats for scanned in repeat.scanned for v in scanned.values}
    return {pick.source for pick in picks.values() if pick.source in leaves} - {
        picks[v].source for v in scanned.intersection(picks)
    }


def _find(program: Program, leaves: Sequence[int], kinds: Sequence[Hashable], pickable: Collection[int]) -> Found:
    """What repeats, where a single entry of those that are pickable, and no part of the others, may be a layer."""
    signatures = Signatures()
    ordered = in_order(program, leaves, signatures, pickable)
    kind_of = {v: kind for v, kind in zip(leaves, kinds, strict=True) if kind is not None}
    of_picks = {v: ("layer of", pick.source) for v, pick in ordered.picks.items() if pick.source in leaves}
    parameters = {
        v: Parameter((kind, str(program.avals[v])), _nbytes(program, v)) for v, kind in (kind_of | of_picks).items()
    }
    finder = _Finder(program, ordered, frozenset(leaves), parameters, signatures)
    repeats = [finder.repeat(run) for run in finder.search(0, len(ordered.equations))]
    found = Found(program, ordered, repeats)
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
    """Whether layers repeat in it, of parameters or, where they were cast before, of what was made of these alone."""
    of_leaves = {v: ("of leaves", str(program.avals[v])) for v in checkpoint.inputs if v in ordered.of_leaves}
    kinds = [parameters[v].kind if v in parameters else of_leaves.get(v) for v in checkpoint.inputs]
    known = [kind for kind in kinds if kind is not None]
    if len(set(known)) == len(known):
        return False
    within = called_by(checkpoint)
    return bool(find_repeats(within, within.inputs, kinds).repeats)


@dataclass
class _Finder:
    program: Program
    ordered: Ordered
    leaves: frozenset[int]
    parameters: Mapping[int, Parameter]
    signatures: Signatures

    def __post_init__(self):
        equations = self.ordered.equations
        self.codes = np.array([self.signatures.of(self.program, e) for e in equations], dtype=np.int64)
        self.maker = {v: (k, o) for k, e in enumerate(equations) for o, v in enumerate(e.outputs)}
        self.readers: dict[int, list[int]] = defaultdict(list)
        for k, equation in enumerate(equations):
            for v in equation.inputs:
                self.readers[v].append(k)
        for equation in self.ordered.first:
            for v in equation.inputs:
                self.readers[v].append(-1)
        for v in self.program.outputs:
            self.readers[v].append(len(equations))

    def search(self, begin: int, end: int) -> list[_Run]:
        """The runs within a part of the program: the best one, and those before and after it."""
        best, least = None, self._unrolled_bytes(begin, end)
        for period in self._periods(begin, end):
            for run in self._runs(period, begin, end):
                cost = self._bytes_with(run, begin, end)
                if cost < least:
                    best, least = run, cost
        if best is None:
            return []
        return self.search(begin, best.start) + [best] + self.search(best.start + best.period * best.layers, end)

    def _read_first(self, begin: int, end: int) -> dict[int, int]:
        """The parameters that are read within a part of the program only, and where first."""
        return {
            v: min(self.readers[v])
            for v in self.parameters
            if self.readers.get(v) and begin <= min(self.readers[v]) and max(self.readers[v]) < end
        }

    def _unrolled_bytes(self, begin: int, end: int) -> int:
        return sum(self.parameters[v].nbytes for v in self._read_first(begin, end))

    def _bytes_with(self, run: _Run, begin: int, end: int) -> int:
        """What is alive at once, roughly: gradients of one layer and of what is not rolled, what is carried, copies."""
        inside = {v for role, values in zip(run.roles, run.values) if self._is_parameter(role, values) for v in values}
        one_layer = {values[0] for role, values in zip(run.roles, run.values) if self._is_parameter(role, values)}
        outside = [v for v in self._read_first(begin, end) if v not in inside]
        size = sum(self.parameters[v].nbytes for v in [*outside, *one_layer])
        carried = {(values[0], role[1:]) for role, values in zip(run.roles, run.values) if role[0] == "carried"}
        # Of a parameter that all layers read, one layer's share of the gradient is alive beside the sum.
        shared = {values[0] for role, values in zip(run.roles, run.values) if role[0] == "constant"}
        size += sum(_nbytes(self.program, v) for v in shared if v in self.leaves or v in self.ordered.of_leaves)
        size += sum(_nbytes(self.program, v) for v, _ in carried)
        stacked = {tuple(values) for role, values in zip(run.roles, run.values) if role[0] == "scanned"}
        return size + sum(_nbytes(self.program, v) for vs in stacked for v in vs if v not in self.parameters)

    def _is_parameter(self, role: tuple[Any, ...], values: Sequence[int]) -> bool:
        return role[0] == "scanned" and values[0] in self.parameters

    def _periods(self, begin: int, end: int) -> list[int]:
        """The distances between the first readers of parameters of one kind."""
        of_kind = defaultdict(list)
        for v, first in self._read_first(begin, end).items():
            of_kind[self.parameters[v].kind].append(first)
        periods = set()
        for firsts in of_kind.values():
            firsts = sorted(set(firsts))
            periods.update(b - a for i, a in enumerate(firsts) for b in firsts[i + 1 : i + 17])
        return sorted(p for p in periods if 0 < 2 * p <= end - begin)

    def _runs(self, period: int, begin: int, end: int) -> Iterator[_Run]:
        codes = self.codes[begin:end]
        alike = np.concatenate([[False], codes[period:] == codes[:-period], [False]])
        edges = np.flatnonzero(alike[1:] != alike[:-1])
        for first, last in zip(edges[::2], edges[1::2]):
            if last - first >= period:
                yield from self._runs_within(period, begin + int(first), begin + int(last) + period)

    def _runs_within(self, period: int, begin: int, end: int) -> Iterator[_Run]:
        """Of a part in which each equation is like the one a period later."""
        handed = self._bytes_handed(begin, end)
        last = min(begin + period, end - 2 * period + 1)
        cuts = sorted(range(begin, last), key=lambda cut: (handed[cut + period - begin], cut))
        for start in cuts[:_CUTS]:
            at = start
            while at + 2 * period <= end:
                runs = self._extend(at, period, end)
                yield from filter(self._is_chain, runs)
                at += period * (runs[-1].layers if runs else 1)

    def _is_chain(self, run: _Run) -> bool:
        """Whether a layer has parameters of its own, and hands on what it makes of what it was handed.

        Products of one value do not: queries, keys and values. Nor do casts, cut between two operations on a parameter.
        """
        if not any(map(self._is_parameter, run.roles, run.values)):
            return False
        roles, depends = iter(run.roles), set()
        for k in range(run.period):
            of_inputs = [next(roles) for _ in self.ordered.equations[run.start + k].inputs]
            if any(role[0] == "carried" or role[0] == "made" and role[1] in depends for role in of_inputs):
                depends.add(k)
        return any(role[0] == "carried" and role[1] in depends for role in run.roles)

    def _bytes_handed(self, begin: int, end: int) -> np.ndarray:
        """What is made before and read after each place."""
        change = np.zeros(end - begin + 1, np.int64)
        for k in range(begin, end):
            for v in self.ordered.equations[k].outputs:
                last = min(max(self.readers[v], default=k), end)
                if last > k:
                    change[k + 1 - begin] += _nbytes(self.program, v)
                    if last < end:
                        change[last + 1 - begin] -= _nbytes(self.program, v)
        return np.cumsum(change)

    def _extend(self, start: int, period: int, end: int) -> list[_Run]:
        """The longest run from here, and before it those in which more is the same for each layer; or none."""
        roles, values = self._first_two(start, period)
        if roles is None or not self._are_apart(roles, values):
            return []
        runs = [_Run(start, period, 2, roles, values)]
        while start + (runs[-1].layers + 1) * period <= end and (following := self._following(runs[-1])) is not None:
            run, (roles, values) = runs[-1], following
            if roles != run.roles:
                runs.append(_Run(start, period, run.layers, roles, [list(before) for before in run.values]))
            for before, v in zip(runs[-1].values, values):
                before.append(v)
            runs[-1].layers += 1
        return [run for run in runs if self._gains(run)]

    def _first_two(self, start: int, period: int) -> tuple[Any, Any]:
        roles, values = [], []
        for k in range(start, start + period):
            pairs = zip(self.ordered.equations[k].inputs, self.ordered.equations[k + period].inputs)
            for v, w in pairs:
                source, following = self._source(v, start, period, 0), self._source(w, start, period, 1)
                role = self._role(v, w, source, following, start, period)
                if role is None:
                    return None, None
                roles.append(role)
                values.append([v, w])
        return roles, values

    def _source(self, v: int, start: int, period: int, layer: int) -> tuple[Any, ...]:
        """Where a layer's value comes from."""
        made_at, output = self.maker.get(v, (-1, 0))
        begin = start + layer * period
        if made_at >= begin:
            return ("made", made_at - begin, output)
        if layer and made_at >= begin - period:
            return ("carried", made_at - begin + period, output)
        return ("older",) if made_at >= start else ("there",)

    def _role(
        self, v: int, w: int, source: tuple[Any, ...], following: tuple[Any, ...], start: int, period: int
    ) -> tuple[Any, ...] | None:
        """Of an input whose values in the first two layers are these."""
        if source[0] == "made":
            return source if following == source else None
        if following[0] == "carried":
            made = self.ordered.equations[start + following[1]].outputs[following[2]]
            alike = str(self.program.avals[v].strip_weak_type()) == str(self.program.avals[made].strip_weak_type())
            return following if alike and v not in self.parameters else None
        if following[0] != "there":
            return None
        if self._same(v, w):
            return ("constant",)
        alike = self._may_be_scanned(v, start, period) and self._may_be_scanned(w, start + period, period)
        return ("scanned",) if alike and self._follows(v, w, 1) else None

    def _following(self, run: _Run) -> tuple[list[tuple[Any, ...]], list[int]] | None:
        """The roles and the values of the layer after a run; what was the same until there may be another for each."""
        begin, roles, found = run.start + run.layers * run.period, [], []
        inputs = (v for k in range(begin, begin + run.period) for v in self.ordered.equations[k].inputs)
        for v, role, before in zip(inputs, run.roles, run.values, strict=True):
            source = self._source(v, run.start, run.period, run.layers)
            if role[0] in ("made", "carried"):
                fits = source == role
            elif source[0] != "there":
                fits = False
            elif role[0] == "constant" and self._same(v, before[0]):
                fits = True
            else:
                role, is_new = ("scanned",), role[0] == "constant"
                fits = self._may_be_scanned(v, begin, run.period) and self._follows(before[0], v, run.layers)
                fits = fits and not (v in self.parameters and (is_new or v in before))
                fits = fits and (not is_new or self._may_be_scanned(before[0], run.start, run.period))
            if not fits:
                return None
            roles.append(role)
            found.append(v)
        if not self._are_apart(roles, [[v] for v in found], run.values):
            return None
        return roles, found

    def _are_apart(self, roles: Sequence[tuple[Any, ...]], *of_layers: Sequence[Sequence[int]]) -> bool:
        """Whether each parameter is a layer of one stack: what is read twice in a layer is so in each, alike."""
        of_inputs = [[v for values in each for v in values] for each in zip(*of_layers)]
        stacks = {tuple(vs) for role, vs in zip(roles, of_inputs) if self._is_parameter(role, vs)}
        layers = [v for stack in stacks for v in stack]
        return len(set(layers)) == len(layers)

    def _same(self, v: int, w: int) -> bool:
        """Whether two values that are there before a run are equal."""
        if self.ordered.same.get(v, v) == self.ordered.same.get(w, w):
            return True
        constants = self.program.constants
        if v not in constants or w not in constants:
            return False
        return self.signatures.constant(self.program, v) == self.signatures.constant(self.program, w)

    def _may_be_scanned(self, v: int, begin: int, period: int) -> bool:
        """Whether a layer may read this value as its own: a parameter only if nothing else reads it."""
        if v in self.parameters:
            return all(begin <= k < begin + period for k in self.readers[v])
        return v not in self.leaves and v not in self.ordered.of_leaves

    def _follows(self, v: int, w: int, layer: int) -> bool:
        """Whether one stack can hold two values, so many layers apart."""
        if (v in self.parameters) != (w in self.parameters):
            return False
        if v not in self.parameters:
            return str(self.program.avals[v].strip_weak_type()) == str(self.program.avals[w].strip_weak_type())
        picks = [self.ordered.picks.get(x) for x in (v, w)]
        if self.parameters[v].kind != self.parameters[w].kind or (picks[0] is None) != (picks[1] is None):
            return False
        return picks[0] is None or picks[1] == picks[0]._replace(index=picks[0].index + layer)

    def _gains(self, run: _Run) -> bool:
        """Whether there are enough layers, or a stack that is there already is scanned over as a whole."""
        picks = [self.ordered.picks.get(vs[0]) for r, vs in zip(run.roles, run.values) if self._is_parameter(r, vs)]
        whole = lambda pick: pick.index == 0 and self.program.avals[pick.source].shape[pick.axis] == run.layers
        fewest = _FEWEST if all(pick is None for pick in picks) else 2
        return run.layers >= fewest and all(pick is None or whole(pick) for pick in picks)

    def repeat(self, run: _Run) -> Repeat:
        """With numbers for what a layer receives."""
        numbers: dict[Any, int] = {}
        number = lambda key: numbers.setdefault(key, len(self.program.avals) + len(numbers))
        carried, scanned, inputs = {}, {}, []
        equations = self.ordered.equations
        for role, values in zip(run.roles, run.values):
            if role[0] == "carried":
                key = (values[0], role)
                carried[key] = Carried(values[0], number(key), equations[run.start + role[1]].outputs[role[2]])
                inputs.append(carried[key].received)
            elif role[0] == "scanned":
                key = tuple(values)
                scanned[key] = Scanned(key, number(key), values[0] in self.parameters)
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
            read=tuple(self._read_after(run)),
        )

    def _read_after(self, run: _Run) -> Iterator[Read]:
        stop = run.start + run.period * run.layers
        for k in range(run.start, stop):
            layer, offset = divmod(k - run.start, run.period)
            for output, v in enumerate(self.ordered.equations[k].outputs):
                if any(reader >= stop for reader in self.readers.get(v, ())):
                    yield Read(v, layer, self.ordered.equations[run.start + offset].outputs[output])


def _nbytes(program: Program, v: int) -> int:
    """Of a value; of keys their number."""
    aval = program.avals[v]
    return aval.size * getattr(aval.dtype, "itemsize", 1)
