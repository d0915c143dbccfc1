"""Searches for runs: which period, and where to cut it, so that the fewest bytes are alive at once."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from adalomo_jax.fused.plan.runs import Layers, Run, bytes_handed, nbytes

_CUTS = 8
"""This many places to cut a period are tried: those where a layer hands the fewest bytes to the next."""


@dataclass
class Search:
    """The runs of a program's equations."""

    layers: Layers

    def __post_init__(self):
        layers = self.layers
        self.program, self.equations, self.parameters = layers.program, layers.ordered.equations, layers.parameters

    def runs(self, begin: int, end: int) -> list[Run]:
        """The runs within a part of the program: the best one, and those before and after it."""
        best, least = None, self._unrolled_bytes(begin, end)
        for period in self._periods(begin, end):
            for run in self._runs(period, begin, end):
                cost = self._bytes_with(run, begin, end)
                if cost < least:
                    best, least = run, cost
        if best is None:
            return []
        return self.runs(begin, best.start) + [best] + self.runs(best.start + best.period * best.layers, end)

    def _read_first(self, begin: int, end: int) -> dict[int, int]:
        """The parameters that are read only within a part of the program, and the first equation that reads each."""
        readers = self.layers.readers
        return {
            v: min(readers[v])
            for v in self.parameters
            if readers.get(v) and begin <= min(readers[v]) and max(readers[v]) < end
        }

    def _unrolled_bytes(self, begin: int, end: int) -> int:
        return sum(self.parameters[v].nbytes for v in self._read_first(begin, end))

    def _bytes_with(self, run: Run, begin: int, end: int) -> int:
        """The bytes alive at once, roughly: gradients of one layer and outside the run, carried values, and copies."""
        is_parameter = self.layers.is_parameter
        of_parameters = [values for role, values in zip(run.roles, run.values) if is_parameter(role, values)]
        inside, one_layer = {v for values in of_parameters for v in values}, {values[0] for values in of_parameters}
        outside = [v for v in self._read_first(begin, end) if v not in inside]
        size = sum(self.parameters[v].nbytes for v in [*outside, *one_layer])
        carried = {(values[0], role[1:]) for role, values in zip(run.roles, run.values) if role[0] == "carried"}
        # If all layers read a parameter, one layer's share of its gradient is alive beside the sum.
        shared = {values[0] for role, values in zip(run.roles, run.values) if role[0] == "constant"}
        of_leaves = self.layers.leaves | self.layers.ordered.of_leaves
        size += sum(nbytes(self.program, v) for v in shared if v in of_leaves)
        size += sum(nbytes(self.program, v) for v, _ in carried)
        stacked = {tuple(values) for role, values in zip(run.roles, run.values) if role[0] == "scanned"}
        return size + sum(nbytes(self.program, v) for vs in stacked for v in vs if v not in self.parameters)

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

    def _runs(self, period: int, begin: int, end: int) -> Iterator[Run]:
        codes = self.layers.codes[begin:end]
        alike = np.concatenate([[False], codes[period:] == codes[:-period], [False]])
        edges = np.flatnonzero(alike[1:] != alike[:-1])
        for first, last in zip(edges[::2], edges[1::2]):
            if last - first >= period:
                yield from self._runs_within(period, begin + int(first), begin + int(last) + period)

    def _runs_within(self, period: int, begin: int, end: int) -> Iterator[Run]:
        """The runs in a part in which each equation is like the one a period later."""
        for start in self.cuts(period, begin, end):
            at = start
            while at + 2 * period <= end:
                runs = self.layers.extend(at, period, end)
                yield from filter(self._is_chain, runs)
                at += period * (runs[-1].layers if runs else 1)

    def cuts(self, period: int, begin: int, end: int) -> list[int]:
        """The places at which the first layer of such a part may begin, the best first."""
        handed = self._bytes_handed(begin, end)
        last = min(begin + period, end - 2 * period + 1)
        return sorted(range(begin, last), key=lambda cut: (handed[cut + period - begin], cut))[:_CUTS]

    def _is_chain(self, run: Run) -> bool:
        """Whether a layer has parameters of its own, and hands on a value that it makes from one that it was handed.

        Products of one value do not: queries, keys and values. Nor do casts, if two operations on a parameter are cut
        apart.
        """
        if not any(map(self.layers.is_parameter, run.roles, run.values)):
            return False
        roles, depends = iter(run.roles), set()
        for k in range(run.period):
            of_inputs = [next(roles) for _ in self.equations[run.start + k].inputs]
            if any(role[0] == "carried" or role[0] == "made" and role[1] in depends for role in of_inputs):
                depends.add(k)
        return any(role[0] == "carried" and role[1] in depends for role in run.roles)

    def _bytes_handed(self, begin: int, end: int) -> np.ndarray:
        """The bytes made before and read after each place."""
        made = [(k, v) for k in range(begin, end) for v in self.equations[k].outputs]
        last_read = lambda v, k: min(max(self.layers.readers[v], default=k), end)
        spans = ((k - begin, last_read(v, k) - begin, nbytes(self.program, v)) for k, v in made)
        return bytes_handed(spans, end - begin)
