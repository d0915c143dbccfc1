"""Stacks of layers in the carry of a loop, updated in place, one layer an iteration.

XLA updates a stack in place only where it is read and written at one layer's index, in the carry of a loop, and where
no read of it can come after the write. A backend that orders them otherwise, or cannot tell, copies the whole stack in
each iteration. So the state of the next layer is read after this layer's is written, and carried; and weights are
written at an index that depends on what is computed from them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from adalomo_jax.barriers import after, barrier, in_order
from adalomo_jax.fused.offload import fetch, is_on_host, put_beside

UpdateLayer = Callable[[jax.Array, list[Any], list[Any], list[Any]], tuple[list[Any], list[Any], Any]]
"""``(i, weights, gradients, state) -> (weights, state, statistics)`` of layer ``i`` of each stack."""


class Part(NamedTuple):
    """Stacks that are updated together, by the positions in `Stacks`."""

    weights: tuple[int, ...]
    own: tuple[int, ...]
    update_layer: UpdateLayer


class Stacks(NamedTuple):
    """What a loop carries to update stacks."""

    weights: list[Any]
    own: list[Any]
    """The optimizer state that is kept for them, with a leading layer axis."""
    own_layer: list[Any]
    """That of the layer that is next."""


def start(weights: list[Any], own: list[Any], first: int) -> Stacks:
    """The carry before the first iteration, which updates layer ``first``."""
    return Stacks(weights, own, [layer_at(x, first) for x in own])


def update(
    stacks: Stacks,
    axes: Sequence[int],
    i: jax.Array,
    following: jax.Array,
    weights: list[Any],
    gradients: list[Any],
    update_layer: UpdateLayer,
    read_by: Any = (),
) -> tuple[Stacks, Any]:
    """The carry with layer ``i`` updated, and the statistics of that.

    Args:
      stacks: the carry.
      axes: the layer axis of the weights of each stack.
      i: the layer.
      following: the layer that the next iteration updates; beyond the stack where there is none.
      weights: layer ``i`` of the stacks, as it was read.
      gradients: of those weights.
      update_layer: the optimizer's step on one layer.
      read_by: all else that is computed from the weights in this iteration.
    """
    weights, own_layer, statistics = update_layer(i, weights, gradients, stacks.own_layer)
    of_each = zip(stacks.own, stacks.own_layer, own_layer, strict=True)
    own = [x if new is old else _write(x, new, i, 0) for x, old, new in of_each]
    i_when_read = lax.platform_dependent(i, read_by, cpu=after, default=lambda i, _: i)
    written = Stacks(
        weights=[_write(x, layer, i_when_read, axis) for x, layer, axis in zip(stacks.weights, weights, axes)],
        own=own,
        own_layer=[layer_at(x, jnp.clip(following, 0, x.shape[0] - 1)) for x in own],
    )
    return written, statistics


def update_parts(
    stacks: Stacks,
    axes: Sequence[int],
    i: jax.Array,
    following: jax.Array,
    layers: Mapping[int, Any],
    gradients: Mapping[int, Any],
    parts: Sequence[Part],
    read_by: Any,
) -> tuple[Stacks, list[Any]]:
    """`update` of each part, one after another: none begins before the stacks of the one before have been written.

    So what was written need not wait on the device, nor its gradient. Returns the statistics of each part, too.

    Args:
      layers: by its position layer ``i`` of each stack, as it was read, the layer axis kept.
      gradients: of these, without that axis.
      parts: of the stacks.
      read_by: all else that is computed from them in this iteration.
    """
    new = Stacks(list(stacks.weights), list(stacks.own), list(stacks.own_layer))
    read = read_again if len(parts) > 1 else lambda layer, stack, i, axis, gradient: jnp.squeeze(layer, axis)
    weights = {k: read(layers[k], stacks.weights[k], i, axes[k], gradients[k]) for part in parts for k in part.weights}
    read_by = (read_by, [gradients[k] for k in weights])
    previous, found = (), {}
    for p, part in enumerate(parts):
        of_part = [gradients[k] for k in part.weights]
        if previous:
            of_part, written = barrier((of_part, [new.weights[k] for k in previous]))
            _put(new.weights, previous, written)
        done, statistics = update(
            Stacks(*([xs[k] for k in at] for xs, at in zip(new, (part.weights, part.own, part.own)))),
            [axes[k] for k in part.weights],
            i,
            following,
            [weights[k] for k in part.weights],
            of_part,
            part.update_layer,
            read_by,
        )
        for xs, at, ys in zip(new, (part.weights, part.own, part.own), done):
            _put(xs, at, ys)
        found[p] = statistics
        previous = part.weights
    return new, [found[p] for p in range(len(parts))]


def _put(xs: list[Any], positions: Sequence[int], ys: Sequence[Any]) -> None:
    for k, y in zip(positions, ys, strict=True):
        xs[k] = y


def layer_at(stack: Any, i: Any, axis: int = 0, *, keepdims: bool = False) -> Any:
    """Layer ``i`` of a stack, on the device, its axes in memory in their order.

    Else a TPU's compiler, where a multiplication prefers another order, gives that to the stack throughout the loop,
    for a copy of the whole stack before and one after it. Now it copies a layer at most.
    """
    return in_order(fetch(lax.dynamic_index_in_dim(stack, i, axis, keepdims=keepdims)))


def read_again(layer: Any, stack: Any, i: Any, axis: int, gradient: Any) -> Any:
    """A layer whose gradient is known, its layer axis gone: on an accelerator read from the stack a second time.

    Else the copy that products have read would wait for its update, while the way back goes on to what comes before. To
    read it again takes one or two passes over the weights more.
    A CPU's compiler copies no layer, and from the host's memory each is fetched once.
    """
    if is_on_host(stack):
        return jnp.squeeze(layer, axis)
    again = lambda layer, stack, i, gradient: lax.dynamic_index_in_dim(stack, after(i, gradient), axis)
    first = lambda layer, stack, i, gradient: layer
    return jnp.squeeze(lax.platform_dependent(layer, stack, i, gradient, cpu=first, default=again), axis)


def _write(stack: Any, layer: Any, i: Any, axis: int) -> Any:
    return lax.dynamic_update_index_in_dim(stack, put_beside(layer, stack), i, axis)
