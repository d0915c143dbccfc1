"""Keeps layers of lists in an NNX model as stacks between the steps; their Variables hold placeholders meanwhile.

`flax.nnx` offers no way to compute a value when it is read: ``nnx.split``, ``nnx.state`` and ``nnx.jit`` take what a
Variable holds as it is. So a Variable whose array is a layer of a stack says so to whoever reads it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from flax import nnx
from jax.core import Tracer

from adalomo_jax.fused.offload import fetch, is_on_host, place
from adalomo_jax.fused.plan.checks import check_not_deleted
from adalomo_jax.fused.plan.placed_tree import layers_of, stack, unstack
from adalomo_jax.fused.sharding import of_layer, sharding_of


class Stacking(NamedTuple):
    """Which parameters are stacked; static."""

    layers: tuple[tuple[int, ...], ...]
    """For each placed parameter, the positions of its layers among the model's; its own position if it is no stack."""
    on_host: tuple[bool, ...]
    """For each placed parameter, whether it is kept in the host's memory."""
    treedef: Any
    """The tree structure of the placed parameters."""

    @property
    def stacks(self) -> list[tuple[tuple[int, ...], bool]]:
        """For each stack, the positions of its layers, and whether it is kept in the host's memory."""
        return [pair for pair in zip(self.layers, self.on_host, strict=True) if len(pair[0]) > 1]


class LayerInStack(np.lib.mixins.NDArrayOperatorsMixin):
    """What a Variable holds if its array is a layer of a stack: the shape and dtype, and no numbers."""

    def __init__(self, stack: jax.Array, layer: int):
        self.stack = stack
        self.layer = layer
        self.shape = stack.shape[1:]
        self.dtype = stack.dtype
        self.ndim = stack.ndim - 1
        self.size = int(np.prod(self.shape))

    def __repr__(self) -> str:
        return f"LayerInStack(layer {self.layer} of {self.stack.shape[0]}, {self.dtype}{list(self.shape)})"

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(_message(self))

    __array__ = __array_ufunc__ = __getitem__ = __setitem__ = __iter__ = __len__ = __bool__ = __float__ = _refuse
    __jax_array__ = property(_refuse)  # raises as soon as JAX looks for the attribute, and says why there is none

    def __getattr__(self, name: str) -> NoReturn:
        known = not name.startswith("_") and hasattr(jax.Array, name)
        raise AttributeError(_message(self) if known else f"{type(self).__name__} has no attribute {name!r}")


def _message(layer: LayerInStack) -> str:
    return (
        f"The {layer.dtype}{list(layer.shape)} read from the model is layer {layer.layer} of a stack, in which "
        "FusedOptimizer(..., roll=True) keeps the layers of a list between its steps. Call optimizer.unplace(model) "
        "before the model is read, saved or given to nnx.jit; the next step stacks them again."
    )


def shapes_of(params: Any) -> Any:
    """The tree without stacks as ``jax.ShapeDtypeStruct``s, given its arrays and layers of stacks."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding_of(x)), params)


def _sharding_of(x: Any) -> Any:
    return of_layer(sharding_of(x.stack), 0) if isinstance(x, LayerInStack) else sharding_of(x)


def stacking_of(placed: Any) -> Stacking:
    """Which parameters are stacked, given what `FusedStep.place` makes of their shapes."""
    leaves, treedef = jax.tree.flatten(placed)
    return Stacking(tuple(layers_of(placed)), tuple(map(is_on_host, leaves)), treedef)


def placed_shapes(params: Any, stacking: Stacking) -> Any:
    """The shapes of the tree that a step takes, given the arrays of a model, or layers of stacks. Computes nothing."""
    leaves = jax.tree.leaves(shapes_of(params))
    placed = [
        place(stack([leaves[i], *map(leaves.__getitem__, others)]), on_host=on_host) if others else leaves[i]
        for (i, *others), on_host in zip(stacking.layers, stacking.on_host, strict=True)
    ]
    return stacking.treedef.unflatten(placed)


def stack_in(model: Any, wrt: Any, stacking: Stacking) -> None:
    """Stacks the layers of a model that are not stacked yet, one at a time: it needs memory for one more stack."""
    leaves, treedef = _flat(model, wrt)
    for positions, on_host in stacking.stacks:
        if not _is_stack([leaves[i] for i in positions]):
            stacked = place(stack([_array_of(leaves[i]) for i in positions]), on_host=on_host)
            for layer, i in enumerate(positions):
                leaves[i] = LayerInStack(stacked, layer)
            nnx.update(model, treedef.unflatten(leaves))


def unstack_in(model: Any, wrt: Any) -> None:
    """Gives the Variables of a model their arrays, which are copies, and drops the stacks, one at a time."""
    leaves, treedef = _flat(model, wrt)
    positions_of: dict[int, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, LayerInStack):
            positions_of.setdefault(id(leaf.stack), []).append(i)
    for positions in positions_of.values():
        check_not_deleted(leaves[positions[0]].stack, "A stack of the model")
        layers = unstack(fetch(leaves[positions[0]].stack))
        for i in positions:
            leaves[i] = layers[leaves[i].layer]
        del layers
        nnx.update(model, treedef.unflatten(leaves))


def is_traced(model: Any, wrt: Any) -> bool:
    """Whether a model holds stacks that are part of a program that is being traced."""
    return any(isinstance(x, LayerInStack) and isinstance(x.stack, Tracer) for x in _flat(model, wrt)[0])


def placed_tree(params: Any, stacking: Stacking) -> Any:
    """The tree that a step takes, given the tree of a model with stacked layers."""
    leaves = jax.tree.leaves(params)
    firsts = [leaves[positions[0]] for positions in stacking.layers]
    return stacking.treedef.unflatten([x.stack if isinstance(x, LayerInStack) else x for x in firsts])


def tree_in_model(placed: Any, stacking: Stacking, treedef: Any) -> Any:
    """The tree that the model holds, given the tree that a step returns."""
    leaves: list[Any] = [None] * treedef.num_leaves
    for x, positions in zip(jax.tree.leaves(placed), stacking.layers, strict=True):
        for layer, i in enumerate(positions):
            leaves[i] = LayerInStack(x, layer) if len(positions) > 1 else x
    return treedef.unflatten(leaves)


def _flat(model: Any, wrt: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(nnx.as_pure(nnx.state(model, wrt)))


def _is_stack(leaves: Sequence[Any]) -> bool:
    """Whether the leaves are all the layers of one stack, in order."""
    return all(
        isinstance(x, LayerInStack) and x.stack is leaves[0].stack and x.layer == layer
        for layer, x in enumerate(leaves)
    ) and leaves[0].stack.shape[0] == len(leaves)


def _array_of(x: Any) -> Any:
    return fetch(x.stack)[x.layer] if isinstance(x, LayerInStack) else x
