"""One forward pass, and the backward pass that updates each parameter as soon as its gradient is complete."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from adalomo_jax.fused import scan, segment
from adalomo_jax.fused.plan import LayerScan, Plan, Stage
from adalomo_jax.fused.stacks import UpdateLayer, layer_at, start, update
from adalomo_jax.optimizers.per_layer import Group, PerLayer
from adalomo_jax.optimizers.rounding import apply_update


class PassResult(NamedTuple):
    """What a pass leaves."""

    outputs: list[Any]
    """The program's: the loss, then aux."""
    leaves: list[Any]
    """The updated parameters."""
    inner: Any
    """The optimizer's new state."""
    squares: jax.Array
    """The sum of the squares of the whole gradient, float32."""


@dataclass(frozen=True)
class Updater:
    """The optimizer's step on some tensors, and the write of its updates to their weights."""

    optimizer: PerLayer
    shared: list[Any]
    """The optimizer's state that belongs to no parameter, before the step."""
    keys: tuple[jax.Array | None, ...]
    """Of each leaf the key that its weights are rounded with; None rounds to nearest."""

    def __call__(
        self, group: Group, layer: jax.Array | None, weights: Sequence[Any], gradients: Sequence[Any], own: list[Any]
    ) -> tuple[list[Any], list[Any], jax.Array]:
        """The weights and own state after the step, and the sum of squares of the gradients."""
        updates, own, _ = self.optimizer.update(group, gradients, own, self.shared, weights)
        return self._write(group, layer, weights, updates), own, sum_of_squares(gradients)

    def update_all(
        self, inner: optax.OptState, leaves: Sequence[Any], gradients: Sequence[Any]
    ) -> tuple[list[Any], optax.OptState]:
        """All leaves after the step, and the new state, given all gradients at once."""
        written, owns = list(leaves), {}
        for group in self.optimizer.groups:
            weights, of_group = [leaves[i] for i in group.leaves], [gradients[i] for i in group.leaves]
            own = self.optimizer.own(inner, group)
            if group.layers is None:
                weights, owns[group], _ = self(group, None, weights, of_group, own)
            else:
                weights, owns[group] = _update_stacks(partial(self, group), weights, of_group, own)
            _assign(written, group, weights)
        return written, self.next_state(inner, owns)

    def next_state(self, inner: optax.OptState, owns: Mapping[Group, list[Any]]) -> optax.OptState:
        """The state after the step, given what is kept for each group."""
        return self.optimizer.assemble(self.optimizer.next_shared(inner), [owns[g] for g in self.optimizer.groups])

    def _write(
        self, group: Group, layer: jax.Array | None, weights: Sequence[Any], updates: Sequence[Any]
    ) -> list[Any]:
        keys = [self.keys[i] for i in group.leaves]
        if layer is not None:
            keys = [None if key is None else jax.random.fold_in(key, layer) for key in keys]
        return list(map(apply_update, weights, updates, keys))


def _update_stacks(
    update_layer: UpdateLayer, weights: list[Any], gradients: list[Any], own: list[Any]
) -> tuple[list[Any], list[Any]]:
    """Stacks and their state after the step: a loop, in place, for under vmap rbg keys would give other bits."""

    def iteration(carry, i_and_gradients):
        i, gradients = i_and_gradients
        layers = [layer_at(stack, i) for stack in carry.weights]
        return update(carry, i, i + 1, layers, gradients, update_layer), None

    length = weights[0].shape[0]
    stacks, _ = lax.scan(iteration, start(weights, own, 0, update_layer), (jnp.arange(length), gradients))
    return stacks.weights, stacks.own


def run(plan: Plan, updater: Updater, inner: optax.OptState, leaves: Sequence[Any], args: Sequence[Any]) -> PassResult:
    """Runs the planned program on ``leaves`` and ``args``, and its backward pass with the updates in it."""
    program, optimizer = plan.program, updater.optimizer
    values = dict(program.constants) | dict(zip(program.inputs, [*leaves, *args], strict=True))
    tapes = [_forward(stage, values, plan.active) for stage in plan.stages]
    loss = program.outputs[0]
    cotangents = {loss: jnp.ones_like(values[loss])} if loss in plan.active else {}

    written, owns, squares = list(leaves), {}, jnp.zeros([], jnp.float32)
    for index, stage in reversed(list(enumerate(plan.stages))):
        if isinstance(stage, LayerScan):
            group = next(group for group in optimizer.groups if group.leaves[0] == stage.stacks[0].leaf)
            stacks, d_inputs = scan.backward(
                stage, tapes[index], values, cotangents, optimizer.own(inner, group), partial(updater, group)
            )
            owns[group] = stacks.own
            _assign(written, group, stacks.weights)
            squares += stacks.statistics
            _accumulate(cotangents, d_inputs)
        else:
            _accumulate(cotangents, segment.backward(tapes[index], program, cotangents))
        if (group := plan.whole_group(index)) is not None:
            gradients = [_gradient(plan, i, cotangents) for i in group.leaves]
            weights, own = [leaves[i] for i in group.leaves], optimizer.own(inner, group)
            weights, owns[group], group_squares = updater(group, None, weights, gradients, own)
            _assign(written, group, weights)
            squares += group_squares
    return PassResult([values[v] for v in program.outputs], written, updater.next_state(inner, owns), squares)


def sum_of_squares(gradients: Iterable[Any]) -> jax.Array:
    """Over all entries, in float32."""
    return sum((jnp.sum(jnp.square(g.astype(jnp.float32))) for g in gradients), start=jnp.zeros([], jnp.float32))


def _forward(stage: Stage, values: dict[int, Any], active: frozenset[int]) -> Any:
    return scan.forward(stage, values) if isinstance(stage, LayerScan) else segment.forward(stage, values, active)


def _gradient(plan: Plan, leaf: int, cotangents: dict[int, Any]) -> Any:
    """The sum of a leaf's cotangents; zeros where the loss does not depend on it."""
    value = plan.program.inputs[leaf]
    return cotangents[value] if value in cotangents else plan.program.zeros(value)


def _accumulate(cotangents: dict[int, Any], pairs: Iterable[tuple[int, Any]]) -> None:
    for v, d in pairs:
        cotangents[v] = cotangents[v] + d if v in cotangents else d


def _assign(leaves: list[Any], group: Group, new: Sequence[Any]) -> None:
    for i, leaf in zip(group.leaves, new, strict=True):
        leaves[i] = leaf
