"""Stacks of layers in the carry of a loop, updated in place, one layer an iteration.

XLA updates a stack in place only if it is in the carry of a loop, is read and written at one layer's index, and cannot
be read after the write. A backend that orders reads and writes differently, or cannot tell, copies the whole stack in
each iteration. So the loop reads the next layer's state after it has written this layer's, and carries it; and it
writes weights at an index that depends on what is computed from them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from adalomo_jax.barriers import after, barrier, in_order
from adalomo_jax.fused.offload import fetch, is_on_host, put_beside
from adalomo_jax.optimizers.kept import is_kept, put_layer, take_layer

UpdateLayer = Callable[[jax.Array, list[Any], list[Any], list[Any]], tuple[list[Any], list[Any], Any]]
"""``(i, weights, gradients, state) -> (weights, state, statistics)`` of layer ``i`` of each stack."""


class Part(NamedTuple):
    """Stacks that are updated together, by their positions in `Stacks`."""

    weights: tuple[int, ...]
    own: tuple[int, ...]
    update_layer: UpdateLayer


class Stacks(NamedTuple):
    """The carry of a loop that updates stacks."""

    weights: list[Any]
    own: list[Any]
    """Their optimizer state, with a leading layer axis."""
    own_layer: list[Any]
    """The optimizer state of the next layer."""


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
    """The carry with layer ``i`` updated, and the statistics of the update.

    Args:
      stacks: the carry.
      axes: the layer axis of the weights of each stack.
      i: the layer.
      following: the layer that the next iteration updates; beyond the stack if there is none.
      weights: layer ``i`` of the stacks, as it was read.
      gradients: the gradients of those weights.
      update_layer: the optimizer's step on one layer.
      read_by: everything else that this iteration computes from the weights.
    """
    weights = [_held(x, gradient) if is_kept(x) else x for x, gradient in zip(weights, gradients)]
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
    """`update` of each part, one after another: each begins only when the stacks of the previous part are written.

    So neither the new weights nor their gradients need to wait on the device. Also returns each part's statistics.

    Args:
      layers: layer ``i`` of each stack by its position, as it was read, with the layer axis kept.
      gradients: the gradients of these layers, without that axis.
      parts: the parts of the stacks.
      read_by: everything else that this iteration computes from the layers.
    """
    new = Stacks(list(stacks.weights), list(stacks.own), list(stacks.own_layer))
    several = len(parts) > 1

    def read(k: int) -> Any:
        stack, axis = stacks.weights[k], axes[k]
        if is_kept(stack):
            return layer_at(stack, after(i, gradients[k]), axis)
        return read_again(layers[k], stack, i, axis, gradients[k]) if several else jnp.squeeze(layers[k], axis)

    weights = {k: read(k) for part in parts for k in part.weights}
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
    """Layer ``i`` of a stack, on the device, with its axes in order in memory.

    Otherwise, if a multiplication prefers another order, a TPU's compiler gives the stack that order throughout the
    loop, and copies the whole stack before and after it. Now it copies a layer at most.
    """
    take = lambda part, axis: in_order(fetch(lax.dynamic_index_in_dim(part, i, axis, keepdims=keepdims)))
    return take_layer(stack, take, axis, keepdims=keepdims)


def read_again(layer: Any, stack: Any, i: Any, axis: int, gradient: Any) -> Any:
    """A layer whose gradient is known, without its layer axis: an accelerator reads it from the stack a second time.

    Otherwise the copy that the products read would stay alive until its update, while the backward pass goes on to
    earlier operations. Reading the layer again takes one or two more passes over the weights.
    A CPU's compiler copies no layer, and each layer in the host's memory is fetched once.
    """
    if is_on_host(stack):
        return jnp.squeeze(layer, axis)
    again = lambda layer, stack, i, gradient: lax.dynamic_index_in_dim(stack, after(i, gradient), axis)
    first = lambda layer, stack, i, gradient: layer
    return jnp.squeeze(lax.platform_dependent(layer, stack, i, gradient, cpu=first, default=again), axis)


def _write(stack: Any, layer: Any, i: Any, axis: int) -> Any:
    put = lambda part, new, axis: lax.dynamic_update_index_in_dim(part, new, i, axis)
    return put_layer(stack, put_beside(layer, stack), put, axis)


def _held(layer: Any, gradient: Any) -> Any:
    """A layer in another form. On a CPU its parts are copied before the stacks that they are from are written.

    Each part of the new layer is made of all parts of the old one. If they were read from the stacks, no stack could be
    written before another is read, and XLA's CPU compiler would copy one. It does not fuse across a condition, and it
    does not know that this one always holds.
    """

    def copied(layer, gradient):
        zero = after(jnp.zeros([], jnp.int32), gradient)
        return lax.cond(zero == 0, lambda x: x, lambda x: jax.tree.map(jnp.zeros_like, x), layer)

    return lax.platform_dependent(layer, gradient, cpu=copied, default=lambda layer, _: layer)
