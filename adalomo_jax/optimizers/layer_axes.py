"""The axis of each parameter along which its layers are stacked."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

LayerAxes = Any | Callable[[optax.Params], Any] | None
"""A tree (or a prefix of one) of the axis along which each leaf's layers are stacked, or None; or a callable for it."""

Path = tuple[Any, ...]


@dataclass(frozen=True)
class LayerKey:
    """The last entry of a layer's path if a stack's place has several layers; it looks like the stack's own entry."""

    stack: Any
    layer: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stack, name)

    def __str__(self) -> str:
        return str(self.stack)


def axes_of_leaves(params: optax.Params, layer_axes: LayerAxes) -> list[int | None]:
    """The layer axis of each leaf: the entry of ``layer_axes`` for the longest prefix of the leaf's path."""
    by_path = entries_of(layer_axes(params) if callable(layer_axes) else layer_axes)

    def axis_of(path: Path, leaf: Any, axis: int | None) -> int | None:
        rank = len(leaf.shape)
        if axis is not None and not -rank <= axis < rank:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"layer_axes of {name} must be an axis of its shape {tuple(leaf.shape)}, got {axis}.")
        return axis

    entries = entries_of_leaves("layer_axes", params, by_path, "the axis of its layers")
    return [axis_of(*leaf, axis) for leaf, axis in zip(jax.tree_util.tree_leaves_with_path(params), entries)]


def entries_of(axes: Any) -> dict[Path, int | None]:
    """The axes of a tree, each by its path. Refuses entries that are no axis."""
    by_path = dict(jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda axis: axis is None))
    for path, axis in by_path.items():
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, (int, np.integer))):
            raise ValueError(f"layer_axes{jax.tree_util.keystr(path)} must be an integer or None, got {axis!r}.")
    return by_path


def entries_of_leaves(option: str, params: optax.Params, by_path: dict[Path, Any], entry: str) -> list[Any]:
    """For each leaf, an option's entry for the longest prefix of the leaf's path. Refuses leaves without an entry.

    Args:
      option: the option's name.
      params: the leaves; masked ones need no entry.
      by_path: the option's entries.
      entry: what an entry is, for the error.
    """
    _check_paths(option, params, by_path)

    def entry_of(path: Path) -> Any:
        prefix = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in by_path), None)
        if prefix is None:
            raise ValueError(f"{option} has no entry for {jax.tree_util.keystr(path)}; give it {entry}, or None.")
        return by_path[prefix]

    return [entry_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _check_paths(option: str, params: optax.Params, by_path: dict[Path, Any]) -> None:
    """Refuses entries that match no parameter. Masked leaves leave an empty node, in their place or further up."""
    is_empty = lambda x: not jax.tree.leaves(x)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_empty)
    empty = {path for path, x in leaves if is_empty(x)}
    known = {path[:n] for path, _ in leaves for n in range(len(path) + 1)}
    for path in by_path:
        if path not in known and not any(path[:n] in empty for n in range(len(path))):
            name = f"{option}{jax.tree_util.keystr(path)}"
            raise ValueError(f"{name} matches no parameter; leave it out, or write it like the parameter's path.")
