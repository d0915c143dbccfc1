"""Where each parameter is updated: a value, made from the traced loss before anything is compiled."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import jax.numpy as jnp

from adalomo_jax.fused.jaxpr import Equation, Program, Scan, active_in_scan, active_values, scan_of
from adalomo_jax.optimizers.per_layer import Group


@dataclass(frozen=True, eq=False)
class Segment:
    """Equations between layer scans, pulled back together."""

    equations: tuple[Equation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    """Those that are read after the segment."""


class Stack(NamedTuple):
    """A leaf that a layer scan updates."""

    leaf: int
    """Its position among the parameters."""
    value: int
    """Its number in the program."""
    body_inputs: tuple[int, ...]
    """The body's inputs that are one layer of it: one, or more where the scan runs over it more than once."""


@dataclass(frozen=True, eq=False)
class LayerScan:
    """A scan over stacked layers, pulled back and updated one layer at a time."""

    scan: Scan
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    """All of the scan's, read or not."""
    read_ys: tuple[int, ...]
    """The positions among the outputs of the ``ys`` that are read after the scan."""
    stacks: tuple[Stack, ...]
    active: frozenset[int]
    """The values of the body that depend on a parameter."""
    invariant: tuple[Equation, ...]
    """The body's equations that are the same in each iteration: what they make is not saved for each layer."""
    varying: tuple[Equation, ...]
    """The others."""


Stage = Segment | LayerScan


@dataclass(frozen=True)
class LeafPlan:
    """Where one parameter is updated."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    layers: int | None
    """The length of its layer axis where it is updated layer by layer in a scan; None where it is updated whole."""
    stage: int
    """The stage of the backward pass after which its last cotangent is there."""
    read_by: tuple[int, ...]
    """The stages of the forward pass that read it."""
    reason: str
    """Why it is updated there."""

    def gradient_bytes_at(self, stage: int) -> int:
        """Bytes of its gradient that are alive while a stage is pulled back: of a stack, one layer's."""
        has_begun = stage <= max(self.read_by, default=self.stage)
        if not (self.stage <= stage and has_begun):
            return 0
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize // (self.layers or 1)


@dataclass(frozen=True)
class Plan:
    """Where each parameter is updated, and the stages of the loss between which that happens. Prints as a table."""

    leaves: tuple[LeafPlan, ...]
    """In the order of ``jax.tree.leaves(params)``."""
    program: Program = field(repr=False, compare=False)
    stages: tuple[Stage, ...] = field(repr=False, compare=False)
    active: frozenset[int] = field(repr=False, compare=False)
    """The values of the program that depend on a parameter."""

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The leaves that are updated together: of each stage the stacks of its scan, or the whole leaves."""
        members: dict[tuple[int, bool], list[int]] = {}
        for i, leaf in enumerate(self.leaves):
            members.setdefault((leaf.stage, leaf.layers is None), []).append(i)
        return tuple(Group(tuple(leaves), self.leaves[leaves[0]].layers) for leaves in members.values())

    def whole_group(self, stage: int) -> Group | None:
        """The whole leaves that are updated after a stage has been pulled back."""
        whole = [group for group in self.groups if group.layers is None]
        return next((group for group in whole if self.leaves[group.leaves[0]].stage == stage), None)

    @property
    def gradient_bytes(self) -> int:
        """The most bytes of gradients alive at once: of one layer, and of whole leaves until they are updated."""
        return max((sum(leaf.gradient_bytes_at(s) for leaf in self.leaves) for s in range(len(self.stages))), default=0)

    def __str__(self) -> str:
        header = ("parameter", "shape", "dtype", "updated", "because")
        rows = [
            (leaf.path, "x".join(map(str, leaf.shape)) or "scalar", leaf.dtype, self._where(leaf), leaf.reason)
            for leaf in self.leaves
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [header, *rows]]
        return "\n".join(lines)

    def _where(self, leaf: LeafPlan) -> str:
        scans = [s for s, stage in enumerate(self.stages) if isinstance(stage, LayerScan)]
        return f"scan {scans.index(leaf.stage)}, layer by layer" if leaf.layers else "whole"


def make_plan(program: Program, paths: Sequence[str]) -> Plan:
    """Plans the updates of the program's first ``len(paths)`` inputs, which are the parameters."""
    values = program.inputs[: len(paths)]
    homes, reasons = zip(*(_home(program, value) for value in values)) if values else ((), ())
    active = frozenset(active_values(program, values))
    stages = _stages(program, homes, active)
    leaves = []
    for i, (path, value) in enumerate(zip(paths, values)):
        aval = program.avals[value]
        layers = None if homes[i] is None else aval.shape[0]
        read_by = tuple(s for s, stage in enumerate(stages) if value in stage.inputs)
        first = min(read_by, default=0)
        leaves.append(LeafPlan(path, aval.shape, str(aval.dtype), layers, first, read_by, reasons[i]))
    return Plan(tuple(leaves), program, stages, active)


def _home(program: Program, leaf: int) -> tuple[Equation | None, str]:
    """The scan that updates a leaf layer by layer, if one can, and the reason."""
    readers = [equation for equation in program.equations if leaf in equation.inputs]
    scans = [equation for equation in readers if equation.name == "scan"]
    if leaf in program.outputs:
        return None, "the loss returns it"
    if not readers:
        return None, "the loss does not read it"
    if not scans:
        return None, _reason_without_scan(program, readers)
    if len(readers) > len(scans):
        others = sorted({equation.name for equation in readers} - {"scan"})
        return None, f"a scan reads it, but so does {', '.join(others)}"
    if len(scans) > 1:
        return None, f"{len(scans)} scans read it"
    scan = scan_of(scans[0])
    if leaf in scans[0].inputs[: scan.first_xs]:
        return None, "each iteration of a scan reads all of it"
    if scan.length == 0:
        return None, "its scan has no iterations"
    return scans[0], f"a scan runs over its {scan.length} layers"


def _reason_without_scan(program: Program, readers: Sequence[Equation]) -> str:
    made = {v: reader.name for reader in readers for v in reader.outputs}
    for equation in program.equations:
        if equation.name == "scan":
            between = sorted({made[v] for v in equation.inputs[scan_of(equation).first_xs :] if v in made})
            if between:
                return f"a scan runs over it only after {', '.join(between)}"
    return "no scan reads it"


def _stages(program: Program, homes: Sequence[Equation | None], active: Collection[int]) -> tuple[Stage, ...]:
    """The program, cut before and after each layer scan."""
    parts: list[list[Equation]] = [[]]
    for equation in program.equations:
        if any(equation is home for home in homes):
            parts += [[equation], []]
        else:
            parts[-1].append(equation)
    stages: list[Stage] = []
    parts = [part for part in parts if part] or [[]]
    read_later = set(program.outputs)
    for part in reversed(parts):
        leaves = {i: program.inputs[i] for i, home in enumerate(homes) if part and home is part[0]}
        stage = _layer_scan(part[0], leaves, active, read_later) if leaves else _segment(part, read_later)
        stages.append(stage)
        read_later.update(stage.inputs)
    return tuple(reversed(stages))


def _segment(equations: Sequence[Equation], read_later: Collection[int]) -> Segment:
    made = {v: None for equation in equations for v in equation.outputs}
    read = {v: None for equation in equations for v in equation.inputs}
    inputs, outputs = [v for v in read if v not in made], [v for v in made if v in read_later]
    return Segment(tuple(equations), tuple(inputs), tuple(outputs))


def _layer_scan(
    equation: Equation, leaves: Mapping[int, int], active: Collection[int], read_later: Collection[int]
) -> LayerScan:
    scan = scan_of(equation)
    body_inputs: dict[int, list[int]] = {value: [] for value in leaves.values()}
    for inner, value in zip(scan.body.inputs, equation.inputs):
        body_inputs.get(value, []).append(inner)
    body_active = frozenset(active_in_scan(scan, [v in active for v in equation.inputs]))
    invariant, varying = _split_invariant(scan, body_active)
    return LayerScan(
        scan=scan,
        inputs=equation.inputs,
        outputs=equation.outputs,
        read_ys=tuple(p for p, v in enumerate(equation.outputs) if p >= scan.num_carry and v in read_later),
        stacks=tuple(Stack(leaf, value, tuple(body_inputs[value])) for leaf, value in leaves.items()),
        active=body_active,
        invariant=tuple(invariant),
        varying=tuple(varying),
    )


def _split_invariant(scan: Scan, active: Collection[int]) -> tuple[list[Equation], list[Equation]]:
    """The body's equations without effects that read only constants and no parameter, and the others."""
    known = {*scan.body.constants, *scan.body.inputs[: scan.num_consts]}.difference(active)
    invariant, varying = [], []
    for equation in scan.body.equations:
        if known.issuperset(equation.inputs) and not equation.source.effects:
            known.update(equation.outputs)
            invariant.append(equation)
        else:
            varying.append(equation)
    return invariant, varying
