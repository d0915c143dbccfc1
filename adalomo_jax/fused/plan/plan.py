"""The plan: where each parameter is updated. It is a value, made from the traced loss before anything is compiled."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import jax.numpy as jnp

from adalomo_jax.fused.plan.homes import NO_SCAN
from adalomo_jax.fused.plan.jaxpr import Equation, Program, Scan
from adalomo_jax.fused.plan.lists import Lists
from adalomo_jax.fused.plan.repeats import find_repeats
from adalomo_jax.fused.sharding import Sharding, of_layer
from adalomo_jax.optimizers.per_layer import Group


@dataclass(frozen=True, eq=False)
class Segment:
    """Equations that are pulled back together."""

    equations: tuple[Equation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    """The values that are read after the segment."""
    batched: bool
    """Whether it runs for each microbatch; if so, all of its outputs differ between microbatches."""


class Stack(NamedTuple):
    """A parameter that a layer scan runs over."""

    leaf: int
    """Its position among the parameters."""
    value: int
    """Its number in the program."""
    axis: int
    """The axis along which its layers are stacked."""
    trained: bool
    """Whether the scan updates it."""
    sharding: Sharding
    """The sharding of one layer, with its layer axis kept."""


@dataclass(frozen=True, eq=False)
class LayerScan:
    """A scan over stacked layers, pulled back and updated one layer at a time."""

    scan: Scan
    operands: tuple[int, ...]
    """All operands of the scan, in its order."""
    outputs: tuple[int, ...]
    """All outputs of the scan, read or not."""
    read_ys: tuple[int, ...]
    """The positions, among the outputs, of the ``ys`` that are read after the scan."""
    stacks: tuple[Stack, ...]
    chain: tuple[Equation, ...]
    """The operations on one layer of the stacks, with its layer axis kept, before the body receives it."""
    layers: tuple[tuple[int, int], ...]
    """Pairs of a body's input and the value that it is one layer of: a stack, or what the chain makes of stacks."""
    invariant: tuple[Equation, ...]
    """The body's equations that are the same in each iteration: their results are not saved for each layer."""
    body: tuple[Segment, ...]
    """The other equations of the body."""
    active: frozenset[int]
    """The values of the body that depend on a trained parameter."""
    batched: frozenset[int]
    """The values of the body that differ between microbatches."""

    @property
    def trained(self) -> tuple[Stack, ...]:
        """The stacks that the scan updates."""
        return tuple(stack for stack in self.stacks if stack.trained)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The values of the program that it reads."""
        from_stacks = {v for v, _ in self.layers}
        others = [outer for v, outer in zip(self.scan.body.inputs, self.operands) if v not in from_stacks]
        return (*(stack.value for stack in self.stacks), *others)

    @cached_property
    def made_of(self) -> dict[int, frozenset[int]]:
        """The stacks that each value is made of. A value is a stack, or the chain makes it of stacks."""
        found = {stack.value: frozenset([stack.value]) for stack in self.stacks}
        for equation in self.chain:
            sources = frozenset[int]().union(*(found[v] for v in equation.inputs if v in found))
            found |= dict.fromkeys(equation.outputs, sources)
        return found

    @cached_property
    def read_by(self) -> tuple[frozenset[int], ...]:
        """For each segment of the body, the stacks that it reads a layer from."""
        outer = dict(self.layers)
        values = [[outer[v] for v in segment.inputs if v in outer] for segment in self.body]
        return tuple(frozenset(stack for value in read for stack in self.made_of[value]) for read in values)

    @cached_property
    def homes(self) -> dict[int, int]:
        """The first segment of the body that reads each stack: once it is pulled back, the gradient is complete.

        Stacks that are made into one value before the scan have one home.
        """
        found = {stack.value: 0 for stack in self.stacks}
        for s in reversed(range(len(self.body))):
            found |= dict.fromkeys(self.read_by[s], s)
        together = [stacks for stacks in self.made_of.values() if len(stacks) > 1]
        for _ in together:
            for stacks in together:
                found |= dict.fromkeys(stacks, min(found[value] for value in stacks))
        return found

    def last_read(self, stack: int) -> int:
        """The last segment of the body that reads a stack. While it is pulled back, the stack's gradient begins."""
        return max((s for s, read in enumerate(self.read_by) if stack in read), default=self.homes[stack])


Stage = Segment | LayerScan


@dataclass(frozen=True)
class LeafPlan:
    """Where one parameter is updated."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool
    layers: int | None
    """The length of its layer axis if it is updated layer by layer in a scan; None if it is updated whole."""
    axis: int | None
    """The axis along which its layers are stacked."""
    stage: int
    """The stage of the backward pass after which its gradient is complete."""
    read_by: tuple[int, ...]
    """The stages of the forward pass that read it."""
    reason: str
    """Why it is updated there. `Plan.reasons` says more about a layer of a list that is not stacked."""
    misplaced: bool
    """Whether a scan runs over its layers, and yet it has to be updated whole."""
    sharding: Sharding = field(default=None, repr=False)
    """How it is spread over an automatic mesh."""
    form: str = ""
    """The name of the form in which its floats are kept, such as ``"int8"``; empty for an array."""
    layer_paths: tuple[str, ...] = ()
    """If layers of a list were stacked, the path that each of them had."""

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the tensor that is updated at once; for a stack, that of one layer."""
        return self.shape if self.axis is None else self.shape[: self.axis] + self.shape[self.axis + 1 :]

    @property
    def tensor_sharding(self) -> Sharding:
        """The sharding of the tensor that is updated at once."""
        return of_layer(self.sharding, self.axis)

    def gradient_bytes_at(self, stage: int) -> int:
        """Bytes of its gradient that are alive while a stage is pulled back; for a stack, those of one layer."""
        has_begun = stage <= max(self.read_by, default=self.stage)
        if not (self.trained and self.stage <= stage and has_begun):
            return 0
        return math.prod(self.tensor_shape) * jnp.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Plan:
    """Where each parameter is updated, and the stages of the loss between which that happens. Prints as a table."""

    leaves: tuple[LeafPlan, ...]
    """In the order of ``jax.tree.leaves(params)``."""
    program: Program = field(repr=False, compare=False)
    stages: tuple[Stage, ...] = field(repr=False, compare=False)
    active: frozenset[int] = field(repr=False, compare=False)
    """The values of the program that depend on a trained parameter."""
    batched: frozenset[int] = field(repr=False, compare=False)
    """The values of the program that differ between microbatches."""
    find_lists: Callable[[], Lists] = field(default=Lists, repr=False, compare=False)
    """Computes `lists`. It searches, so it is called only when `lists` is read."""

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The trained leaves that are updated together: the stacks of a stage's scan, or its whole leaves."""
        members: dict[tuple[int, bool], list[int]] = {}
        for i, leaf in enumerate(self.leaves):
            if leaf.trained:
                members.setdefault((leaf.stage, leaf.layers is None), []).append(i)
        return tuple(Group(tuple(leaves), self.leaves[leaves[0]].layers) for leaves in members.values())

    @property
    def updates_early(self) -> bool:
        """Whether any gradient can be freed before all are complete. If not, the fused step is the unfused one."""
        return len(self.stages) > 1 or any(isinstance(stage, LayerScan) for stage in self.stages)

    def group_of(self, stage: int, *, whole: bool) -> Group | None:
        """The leaves that are updated in a stage's scan, or the whole leaves updated after it is pulled back."""
        groups = [group for group in self.groups if (group.layers is None) == whole]
        return next((group for group in groups if self.leaves[group.leaves[0]].stage == stage), None)

    @cached_property
    def stacks_of_matrices(self) -> tuple[int, ...]:
        """The positions of the leaves that ``offload="params"`` keeps in host memory.

        Layer scans run over these leaves, trained or not, on an axis before their last two: a layer is whole matrices.
        """
        stacks = [stack for stage in self.stages if isinstance(stage, LayerScan) for stack in stage.stacks]
        return tuple(sorted(stack.leaf for stack in stacks if stack.axis < len(self.leaves[stack.leaf].shape) - 2))

    @property
    def gradient_bytes(self) -> int:
        """The most bytes of gradients alive at once: of one layer, and of whole leaves until they are updated."""
        return max(map(self._gradient_bytes_at, range(len(self.stages))), default=0)

    def _gradient_bytes_at(self, index: int) -> int:
        """Bytes alive while a stage is pulled back; for a scan, those of the segment of its body that has the most."""
        stage, of_leaves = self.stages[index], [leaf.gradient_bytes_at(index) for leaf in self.leaves]
        if not isinstance(stage, LayerScan):
            return sum(of_leaves)
        stacks = [stack for stack in stage.trained if self.leaves[stack.leaf].layers and of_leaves[stack.leaf]]
        of_stacks = [
            sum(of_leaves[x.leaf] for x in stacks if stage.homes[x.value] <= s <= stage.last_read(x.value))
            for s in range(len(stage.body))
        ]
        return sum(of_leaves) - sum(of_leaves[stack.leaf] for stack in stacks) + max(of_stacks)

    def __str__(self) -> str:
        header = ("parameter", "shape", "dtype", "updated", "because")
        rows = [
            (leaf.path, "x".join(map(str, leaf.shape)) or "scalar", _kind(leaf), self._where(leaf), reason)
            for leaf, reason in zip(self.leaves, self.reasons)
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [header, *rows]]
        trained = [leaf for leaf in self.leaves if leaf.trained]
        of_all = sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in trained)
        lines.append(f"gradients alive at once: {self.gradient_bytes:,} of {of_all:,} bytes")
        lines += [
            f"{repeat.layers} layers in a list repeat. step.place(params, *args) (FusedOptimizer and TrainState: "
            "roll=True) stacks them: then only one layer's gradients are alive at a time"
            for repeat in self.lists.repeats
        ]
        lines += [
            f"{repeat.layers} layers in a list repeat, but too few for a stack to save memory, unless each is under "
            f"jax.checkpoint. fuse(..., roll={repeat.layers}) and step.place(params, *args) stack them anyway"
            for repeat in self.lists.too_few
        ]
        return "\n".join(lines)

    @cached_property
    def lists(self) -> Lists:
        """Layers that repeat in a list, which `FusedStep.place` would stack or not, and why others are not stacked."""
        return self.find_lists()

    @property
    def may_repeat(self) -> bool:
        """Whether layers in a list repeat, as far as is known without asking the optimizer."""
        of_leaves = self.program.inputs[: len(self.leaves)]
        return bool(find_repeats(self.program, of_leaves, [leaf.trained for leaf in self.leaves]).repeats)

    @cached_property
    def reasons(self) -> tuple[str, ...]:
        """Why each parameter is updated where it is; for an unstacked layer of a list, why it is in no stack."""
        of_lists = self.lists.reasons or [None] * len(self.leaves)
        return tuple(map(_with_reason, self.leaves, of_lists))

    def _where(self, leaf: LeafPlan) -> str:
        if not leaf.trained:
            return "not"
        scans = [s for s, stage in enumerate(self.stages) if isinstance(stage, LayerScan)]
        return f"scan {scans.index(leaf.stage)}, layer by layer" if leaf.layers else "whole"


def _kind(leaf: LeafPlan) -> str:
    return f"{leaf.dtype} in {leaf.form}" if leaf.form else leaf.dtype


def _with_reason(leaf: LeafPlan, of_list: str | None) -> str:
    if of_list is None or leaf.axis is not None:
        return leaf.reason
    if leaf.trained:
        return of_list if leaf.reason == NO_SCAN else leaf.reason
    return of_list if of_list.startswith(leaf.reason) else f"{leaf.reason}, nor stacked: {of_list}"
