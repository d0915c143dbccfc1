"""Trees of parameters in which layers of a list are stacked: the stack takes the place of the first layer's leaf.

An :class:`InStack`, which has no arrays, takes the place of each other layer's leaf. So the tree keeps its structure
and its paths, records what became of each leaf, and can be turned back into the tree that it was made from.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from adalomo_jax.fused.plan.paths import path_name
from adalomo_jax.fused.sharding import Sharding, of_layer, of_stack, sharding_of
from adalomo_jax.optimizers.kept import is_kept


@jax.tree_util.register_static
@dataclass(frozen=True)
class InStack:
    """Takes the place of a parameter that is a layer of a stack."""

    stack: str
    """The path of the stack, which is that of its first layer, as ``jax.tree_util.keystr`` writes it."""
    layer: int
    """The layer's index in the stack, from 1 on."""


def is_stacked(params: Any) -> bool:
    """Whether a tree has stacked layers."""
    return any(isinstance(x, InStack) for x in _entries(params)[1])


def stack_layers(params: Any, stacks: Iterable[Sequence[int]]) -> Any:
    """Stacks leaves of a tree.

    Args:
      params: arrays, or ``jax.ShapeDtypeStruct``s.
      stacks: for each stack, the positions of its layers among the leaves.
    """
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_kept)
    leaves = [leaf for _, leaf in paths_and_leaves]
    for positions in stacks:
        layers = [leaves[i] for i in positions]
        first = jax.tree_util.keystr(paths_and_leaves[positions[0]][0])
        leaves[positions[0]] = stack(layers)
        for layer, i in enumerate(positions[1:], 1):
            leaves[i] = InStack(first, layer)
    return treedef.unflatten(leaves)


def unstack_layers(params: Any) -> Any:
    """The tree before stacking, with slices of the stacks as leaves: under ``jax.jit`` without a copy of their own."""
    paths, entries, treedef = _entries(params)
    found = list(entries)
    for first, *others in _stacks(paths, entries):
        stacked, positions = entries[first], (first, *others)
        are_arrays = [isinstance(x, jax.Array) and not isinstance(x, Tracer) for x in jax.tree.leaves(stacked)]
        layers = unstack(stacked) if all(are_arrays) else [layer_of(stacked, i) for i in range(len(positions))]
        for i, layer in zip(positions, layers, strict=True):
            found[i] = layer
    return treedef.unflatten(found)


def layers_of(params: Any) -> list[tuple[int, ...]]:
    """The positions of each leaf's layers among the leaves of `unstack_layers`; if it is no stack, its own position."""
    paths, entries, _ = _entries(params)
    stacks = {positions[0]: positions for positions in _stacks(paths, entries)}
    return [stacks.get(i, (i,)) for i, entry in enumerate(entries) if not isinstance(entry, InStack)]


def _stacks(paths: Sequence[str], entries: Sequence[Any]) -> list[tuple[int, ...]]:
    """The positions of each stack's layers, its own first. Refuses a tree that `stack_layers` did not make.

    Raises:
      ValueError: if a stack is missing, or if its number of layers differs from the number of places for them.
    """
    way_out = "Change the tree that step.unplace(params) returns, and place that with step.place(params, *args)."
    position = {path: i for i, path in enumerate(paths) if not isinstance(entries[i], InStack)}
    members: dict[str, dict[int, int]] = {}
    for i, entry in enumerate(entries):
        if isinstance(entry, InStack):
            if entry.stack not in position:
                raise ValueError(
                    f"params{paths[i]} is layer {entry.layer} of the stack params{entry.stack}, which is missing. "
                    f"{way_out}"
                )
            members.setdefault(entry.stack, {position[entry.stack]: 0})[i] = entry.layer
    for path, layer_at in members.items():
        stack_shape = tuple(entries[position[path]].shape)
        if sorted(layer_at.values()) != list(range(len(layer_at))) or stack_shape[:1] != (len(layer_at),):
            raise ValueError(
                f"params{path} is a stack of the shape {stack_shape}, and in params there are "
                f"places for its layers {sorted(layer_at.values())}. {way_out}"
            )
    return [tuple(sorted(layer_at, key=layer_at.__getitem__)) for layer_at in members.values()]


def layer_paths(params: Any) -> list[tuple[str, ...]]:
    """For each leaf of a tree, the paths of its layers in the tree before stacking; none if it is no stack."""
    is_entry = lambda x: isinstance(x, InStack) or is_kept(x)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_entry)]
    return [tuple(path_name(paths[i]) for i in layers) if len(layers) > 1 else () for layers in layers_of(params)]


def _entries(params: Any) -> tuple[list[str], list[Any], Any]:
    """The paths of the leaves and of the `InStack`s, these entries, and the structure."""
    is_entry = lambda x: isinstance(x, InStack) or is_kept(x)
    paths_and_entries, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_entry)
    return [jax.tree_util.keystr(path) for path, _ in paths_and_entries], [x for _, x in paths_and_entries], treedef


def stack(layers: Sequence[Any]) -> Any:
    """Stacks arrays, shapes or weights of one form along a new first axis. Each stays spread over devices as it is."""
    return jax.tree.map(lambda *parts: _stack(parts), *layers)


def _stack(layers: Sequence[Any]) -> Any:
    sharding = of_stack(sharding_of(layers[0]))
    if isinstance(layers[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(layers), *layers[0].shape), layers[0].dtype, sharding=sharding)
    return _stacking(sharding)(list(layers))


def unstack(stack: Any) -> list[Any]:
    """Copies of a stack's layers, each spread over devices as it is in the stack."""
    parts, treedef = jax.tree.flatten(stack)
    return list(map(treedef.unflatten, zip(*(_unstacking(of_layer(sharding_of(x), 0))(x) for x in parts))))


@lru_cache(maxsize=64)
def _stacking(sharding: Sharding) -> Any:
    """Compiled once for each kind of layer, however often it is called."""
    return jax.jit(lambda layers: jnp.stack(layers), out_shardings=sharding)


@lru_cache(maxsize=64)
def _unstacking(sharding: Sharding) -> Any:
    return jax.jit(lambda stack: [layer_of(stack, i) for i in range(stack.shape[0])], out_shardings=sharding)


def layer_of(stack: Any, i: int) -> Any:
    """One layer of a stack, or of its shape."""
    return jax.tree.map(lambda part: _layer_of(part, i), stack)


def _layer_of(stack: Any, i: int) -> Any:
    if isinstance(stack, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=of_layer(sharding_of(stack), 0))
    return lax.index_in_dim(stack, i, 0, keepdims=False)
