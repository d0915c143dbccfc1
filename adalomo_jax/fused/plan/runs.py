"""Runs of equations in which each layer is like the one before, and how the inputs of two such layers relate.

A value that a layer reads was made in that layer, or by the layer before at the same place (carried), or before the
run. In the last case it is the same for each layer (constant), or each layer has its own (scanned).
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from adalomo_jax.fused.plan.equation_signatures import Signatures
from adalomo_jax.fused.plan.jaxpr import Program
from adalomo_jax.fused.plan.order import Ordered

FEWEST = 3
"""The fewest layers of a list to stack. With two, one is copied at each read from the stack: nothing is gained."""


class Parameter(NamedTuple):
    """A value that may be one layer's share of a stack: a parameter, or one layer of a parameter that is a stack."""

    kind: Hashable
    """Equal for parameters that one stack can hold."""
    nbytes: int


@dataclass
class Run:
    """A run as it is found: where each input of a layer's equations comes from, in their order."""

    start: int
    period: int
    layers: int
    roles: list[tuple[Any, ...]]
    values: list[list[int]]
    """For each input, its value in each layer."""


@dataclass
class Layers:
    """A program whose layers may be alike: what makes and what reads its values, and which are parameters."""

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

    def first_use(self, v: int) -> int:
        """The first equation that reads a value, or that reads what was made from it and from parameters alone."""
        k = min(self.readers.get(v, ()), default=len(self.codes))
        made = self.ordered.equations[k].outputs if 0 <= k < len(self.codes) else ()
        return min(map(self.first_use, made)) if made and self.ordered.of_leaves.issuperset(made) else k

    def extend(self, start: int, period: int, end: int) -> list[Run]:
        """The longest run from here, preceded by those in which more is the same for each layer; or none."""
        roles, values = self._first_two(start, period)
        if roles is None or not self._are_apart(roles, values):
            return []
        runs = [Run(start, period, 2, roles, values)]
        while start + (runs[-1].layers + 1) * period <= end and (following := self._following(runs[-1])) is not None:
            run, (roles, values) = runs[-1], following
            if roles != run.roles:
                runs.append(Run(start, period, run.layers, roles, [list(before) for before in run.values]))
            for before, v in zip(runs[-1].values, values):
                before.append(v)
            runs[-1].layers += 1
        return [run for run in runs if self._gains(run)]

    def _first_two(self, start: int, period: int) -> tuple[Any, Any]:
        roles, values = [], []
        for _, v, w, role in self.first_two(start, period):
            if role is None:
                return None, None
            roles.append(role)
            values.append([v, w])
        return roles, values

    def first_two(self, start: int, period: int) -> Iterator[tuple[int, int, int, tuple[Any, ...] | None]]:
        """For each input of two layers, the equation's position, both values, and the role; None if they differ."""
        for k in range(start, start + period):
            for v, w in zip(self.ordered.equations[k].inputs, self.ordered.equations[k + period].inputs):
                source, following = self._source(v, start, period, 0), self._source(w, start, period, 1)
                yield k, v, w, self._role(v, w, source, following, start, period)

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
        """The role of an input that has these values in the first two layers."""
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
        alike = self.may_be_scanned(v, start, period) and self.may_be_scanned(w, start + period, period)
        return ("scanned",) if alike and self._follows(v, w, 1) else None

    def _following(self, run: Run) -> tuple[list[tuple[Any, ...]], list[int]] | None:
        """The roles and the values of the layer after a run. An input that was constant so far may become scanned."""
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
                fits = self.may_be_scanned(v, begin, run.period) and self._follows(before[0], v, run.layers)
                fits = fits and not (v in self.parameters and (is_new or v in before))
                fits = fits and (not is_new or self.may_be_scanned(before[0], run.start, run.period))
            if not fits:
                return None
            roles.append(role)
            found.append(v)
        if not self._are_apart(roles, [[v] for v in found], run.values):
            return None
        return roles, found

    def _are_apart(self, roles: Sequence[tuple[Any, ...]], *of_layers: Sequence[Sequence[int]]) -> bool:
        """Whether each parameter is in one stack only: if a layer reads one twice, each does, in the same places."""
        of_inputs = [[v for values in each for v in values] for each in zip(*of_layers)]
        stacks = {tuple(vs) for role, vs in zip(roles, of_inputs) if self.is_parameter(role, vs)}
        layers = [v for stack in stacks for v in stack]
        return len(set(layers)) == len(layers)

    def _same(self, v: int, w: int) -> bool:
        """Whether two values that exist before a run are equal."""
        if self.ordered.same.get(v, v) == self.ordered.same.get(w, w):
            return True
        constants = self.program.constants
        if v not in constants or w not in constants:
            return False
        return self.signatures.constant(self.program, v) == self.signatures.constant(self.program, w)

    def may_be_scanned(self, v: int, begin: int, period: int) -> bool:
        """Whether a layer may read this value as its own: a parameter only if nothing else reads it."""
        if v in self.parameters:
            return all(begin <= k < begin + period for k in self.readers[v])
        return v not in self.leaves and v not in self.ordered.of_leaves

    def _follows(self, v: int, w: int, layer: int) -> bool:
        """Whether one stack can hold two values that are this many layers apart."""
        if (v in self.parameters) != (w in self.parameters):
            return False
        if v not in self.parameters:
            return str(self.program.avals[v].strip_weak_type()) == str(self.program.avals[w].strip_weak_type())
        picks = [self.ordered.picks.get(x) for x in (v, w)]
        if self.parameters[v].kind != self.parameters[w].kind or (picks[0] is None) != (picks[1] is None):
            return False
        return picks[0] is None or picks[1] == picks[0]._replace(index=picks[0].index + layer)

    def _gains(self, run: Run) -> bool:
        """Whether there are enough layers, or the run scans over the whole of a stack that exists already."""
        picks = [self.ordered.picks.get(vs[0]) for r, vs in zip(run.roles, run.values) if self.is_parameter(r, vs)]
        whole = lambda pick: pick.index == 0 and self.program.avals[pick.source].shape[pick.axis] == run.layers
        fewest = FEWEST if all(pick is None for pick in picks) else 2
        return run.layers >= fewest and all(pick is None or whole(pick) for pick in picks)

    def is_parameter(self, role: tuple[Any, ...], values: Sequence[int]) -> bool:
        return role[0] == "scanned" and values[0] in self.parameters


def nbytes(program: Program, v: int) -> int:
    """The bytes of a value; for keys, their number."""
    aval = program.avals[v]
    return aval.size * getattr(aval.dtype, "itemsize", 1)


def bytes_handed(spans: Iterable[tuple[int, int, int]], n: int) -> np.ndarray:
    """The bytes handed on before each of ``n`` places, and after the last: made before it, read there or after it.

    Args:
      spans: for each value, the place that makes it (-1 if it existed before), the last one that reads it (n: what
        comes after), and its bytes.
      n: the number of places.
    """
    change = np.zeros(n + 1, np.int64)
    for made_at, last_read, size in spans:
        if last_read > made_at:
            change[made_at + 1] += size
            if last_read < n:
                change[last_read + 1] -= size
    return np.cumsum(change)
