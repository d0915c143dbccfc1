"""Optax transformations on stacked layers: each layer of a stack counts as a tensor of its own.

A leaf of shape ``[layers, ...]`` that a scan runs over is many tensors. :class:`PerLayer` takes a transformation that
treats leaves separately and applies it to some tensors at a time, so a program can update the layers one by one or all
at once. The state is the transformation's own, except that its entries for a stacked leaf have a leading layer axis. A
step count or an injected hyperparameter stays a scalar.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adalomo_jax.optimizers.arguments import check_transformation
from adalomo_jax.optimizers.layer_axes import LayerAxes, axes_of_leaves, entries_of

_in_a_stack = ContextVar("in_a_stack", default=False)
"""Whether a transformation is being asked about one layer of a stack."""


class Group(NamedTuple):
    """Leaves that are updated together: either all whole, or all stacks of the same number of layers."""

    leaves: tuple[int, ...]
    """Positions in the flattened parameters."""
    layers: int | None
    """The length of the leaves' layer axis; None if they are updated whole."""


@dataclass(frozen=True)
class PerLayer:
    """A transformation, applied to groups of the leaves of one tree. Leaves outside the group are masked out.

    Stacks have their layer axis first, here and in the state.
    """

    tx: optax.GradientTransformationExtraArgs
    treedef: Any
    """The tree structure of the parameters."""
    tensors: tuple[jax.ShapeDtypeStruct, ...]
    """The shape and dtype of one tensor of each leaf: for a stack, those of one layer."""
    groups: tuple[Group, ...]
    """A leaf that is in no group is not trained: ``tx`` never sees it, and keeps nothing for it."""

    def init(self, leaves: Sequence[Any], axes: Sequence[int | None] | None = None) -> optax.OptState:
        """``tx.init`` of each tensor; the states of a stack's layers are stacked.

        Args:
          leaves: the parameters.
          axes: the layer axis of each stack in ``leaves``; the first axis by default.
        """
        if self._first_group is None:
            return self.tx.init(self.treedef.unflatten(leaves))
        axes = [0] * len(leaves) if axes is None else axes
        return self.assemble(self._init_shared(), [self._init_group(group, leaves, axes) for group in self.groups])

    def update(
        self, group: Group, grads: Sequence[Any], own: Sequence[Any], shared: Sequence[Any], leaves: Any, **extra_args
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """``tx.update`` of one tensor of each of the group's leaves.

        Args:
          group: the group to update.
          grads: the gradient of each leaf; for a stack, that of one layer.
          own: the state that ``tx`` keeps for these tensors, as `own` gives it; for a stack, that of one layer.
          shared: the state that ``tx`` keeps for no leaf, as `shared` gives it.
          leaves: the parameter of each leaf; for a stack, one layer of it. None if ``tx`` needs no parameters.

        Returns:
          The updates, and the new own and shared state.
        """
        paths, treedef = self._layout_of(group)
        by_path = dict(zip(self._own_paths(group), own)) | dict(zip(self.shared_paths, shared))
        state = jax.tree.unflatten(treedef, [by_path[path] for path in paths])
        params = None if leaves is None else self.tree_of(group.leaves, leaves)
        with asking_for(group):
            updates, state = self.tx.update(self.tree_of(group.leaves, grads), state, params, **extra_args)
        after = dict(jax.tree_util.tree_leaves_with_path(state))
        new_own = [after[path] for path in self._own_paths(group)]
        return jax.tree.leaves(updates), new_own, [after[path] for path in self.shared_paths]

    def own(self, state: optax.OptState, group: Group) -> list[Any]:
        """The leaves of the state that ``tx`` keeps for the group's leaves; for a stack, with a leading layer axis."""
        by_path = dict(jax.tree_util.tree_leaves_with_path(state))
        return [by_path[path] for path in self._own_paths(group)]

    def init_own(self, group: Group, tensors: Sequence[Any]) -> list[Any]:
        """The state that ``tx.init`` makes for one tensor of each of the group's leaves; for a stack, for one layer."""
        with asking_for(group):
            by_path = dict(jax.tree_util.tree_leaves_with_path(self.tx.init(self.tree_of(group.leaves, tensors))))
        return [by_path[path] for path in self._own_paths(group)]

    def shared(self, state: optax.OptState) -> list[Any]:
        """The leaves of the state that belong to no parameter: step counts, hyperparameters."""
        by_path = dict(jax.tree_util.tree_leaves_with_path(state))
        return [by_path[path] for path in self.shared_paths]

    def next_shared(self, state: optax.OptState, **extra_args) -> list[Any]:
        """The shared state after a step. It depends on no gradient, so ``tx`` is called with zeros."""
        group = self._first_group
        if group is None:
            return self.shared(state)
        zeros = [jnp.zeros(self.tensors[i].shape, self.tensors[i].dtype) for i in group.leaves]
        own = self.own(state, group)
        if group.layers is not None:
            own = [jnp.zeros(x.shape[1:], x.dtype) for x in own]
        return self.update(group, zeros, own, self.shared(state), zeros, **extra_args)[2]

    def assemble(self, shared: Sequence[Any], owns: Sequence[Sequence[Any]]) -> optax.OptState:
        """The state made of these parts: the shared one, and one for each of `groups`."""
        by_path = dict(zip(self.shared_paths, shared))
        for group, own in zip(self.groups, owns, strict=True):
            by_path |= zip(self._own_paths(group), own)
        paths, treedef = self._state_layout
        return jax.tree.unflatten(treedef, [by_path[path] for path in paths])

    def update_all(
        self, grads: Sequence[Any], state: optax.OptState, leaves: Sequence[Any] | None, **extra_args
    ) -> tuple[list[Any], optax.OptState]:
        """``tx.update`` of every tensor at once, mapped over the layers of each stack."""
        shared, owns = self.shared(state), []
        updates: list[Any] = [None] * len(grads)
        for group in self.groups:
            of_tensors = lambda g, own, p, group=group: self.update(group, g, own, shared, p, **extra_args)[:2]
            of_leaves = of_tensors if group.layers is None else jax.vmap(of_tensors)
            params = None if leaves is None else [leaves[i] for i in group.leaves]
            group_updates, own = of_leaves([grads[i] for i in group.leaves], self.own(state, group), params)
            owns.append(own)
            for i, u in zip(group.leaves, group_updates):
                updates[i] = u
        return updates, self.assemble(self.next_shared(state, **extra_args), owns)

    def tree_of(self, positions: Sequence[int], leaves: Sequence[Any]) -> Any:
        """A tree like the parameters, with these leaves and ``optax.MaskedNode()`` in place of the others."""
        chosen = dict(zip(positions, leaves, strict=True))
        return self.treedef.unflatten([chosen.get(i, optax.MaskedNode()) for i in range(self.treedef.num_leaves)])

    def _init_group(self, group: Group, leaves: Sequence[Any], axes: Sequence[int | None]) -> list[Any]:
        """The own state of a group."""
        of_group = [leaves[i] for i in group.leaves]

        init = partial(self.init_own, group)
        if group.layers is None:
            return init(of_group)
        if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in of_group):
            return jax.vmap(init, in_axes=([axes[i] for i in group.leaves],))(of_group)
        own = init([self.tensors[i] for i in group.leaves])
        return [jnp.broadcast_to(x, (group.layers, *jnp.shape(x))) for x in own]

    def _init_shared(self) -> list[Any]:
        """The shared state. It depends on no tensor, but Optax may choose its dtype by those of all tensors."""

        def init() -> list[Any]:
            tensors = [jnp.zeros(self.tensors[i].shape, self.tensors[i].dtype) for i in self._trained]
            with asking_for(None):
                by_path = dict(jax.tree_util.tree_leaves_with_path(self.tx.init(self.tree_of(self._trained, tensors))))
            return [by_path[path] for path in self.shared_paths]

        return jax.jit(init)() if self.shared_paths else []

    def _abstract_init(self, params: optax.Params) -> tuple[list[Any], Any]:
        with asking_for(None):
            state = jax.eval_shape(self.tx.init, params)
        paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
        return [path for path, _ in paths_and_leaves], treedef

    @property
    def _first_group(self) -> Group | None:
        """The group of the first leaf that is in a group: Optax takes that leaf's dtype for state of no parameter."""
        return min(self.groups, key=lambda group: min(group.leaves), default=None)

    @cached_property
    def _state_layout(self) -> tuple[list[Any], Any]:
        return self._abstract_init(self.tree_of(self._trained, [self.tensors[i] for i in self._trained]))

    @cached_property
    def shared_paths(self) -> list[Any]:
        """The paths of the state's leaves that belong to no parameter."""
        try:
            return self._abstract_init(self.tree_of([], []))[0]
        except Exception as error:
            raise ValueError(
                "tx.init must accept a tree of optax.MaskedNode()s, which gives the state that belongs to no leaf, but "
                f"it raises {error!r}. A tx that looks at all parameters at once, such as a line search, cannot be "
                "given some."
            ) from error

    def _layout_of(self, group: Group) -> tuple[list[Any], Any]:
        """The paths and structure of the state that `tx` keeps for a group's leaves, or for some of them."""
        if group not in self._layouts:
            tensors = [self.tensors[i] for i in group.leaves]
            self._layouts[group] = self._abstract_init(self.tree_of(group.leaves, tensors))
        return self._layouts[group]

    @cached_property
    def _layouts(self) -> dict[Group, tuple[list[Any], Any]]:
        return {}

    def owners(self, group: Group) -> list[int | None]:
        """For each leaf of a group's own state, the parameter that it belongs to; None if it belongs to several."""
        return self.owners_of(self._own_paths(group))

    def owners_of(self, paths: Sequence[Any]) -> list[int | None]:
        """For leaves of the state, by path, the parameter that each belongs to; None if it belongs to several."""
        return [self._owners[path] for path in paths]

    @cached_property
    def _owners(self) -> dict[Any, int | None]:
        """The owner of each leaf of the state.

        For each bit of the parameters' positions, ``tx`` is asked for its state for one half of the parameters and for
        the other. The answers spell the position. A leaf that belongs to several is in both halves of some split.
        """
        owners: dict[Any, int | None] = dict.fromkeys(self._state_layout[0], 0)
        for bit in range(len(self.tensors).bit_length()):
            halves = []
            for value in (0, 1):
                half = [i for i in self._trained if i >> bit & 1 == value]
                halves.append({*self._abstract_init(self.tree_of(half, [self.tensors[i] for i in half]))[0]})
            for path, owner in owners.items():
                if path in halves[1]:
                    owners[path] = None if owner is None or path in halves[0] else owner | 1 << bit
        return owners

    @cached_property
    def _trained(self) -> list[int]:
        """The positions of the leaves in groups."""
        return sorted(i for group in self.groups for i in group.leaves)

    def _own_paths(self, group: Group) -> list[Any]:
        return [path for path in self._layout_of(group)[0] if path not in self.shared_paths]


class ExtraArgumentMissing(ValueError):
    """``tx.update`` requires a keyword argument that it was not given."""


@contextmanager
def asking_for(group: Group | None) -> Iterator[None]:
    """Calls of ``tx`` for the leaves of a group; None if only shapes are asked for."""
    token = _in_a_stack.set(group is not None and group.layers is not None)
    try:
        with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an integer, whatever users forbid
            yield
    except (AttributeError, TypeError) as error:
        if missing := re.search(r"missing \d+ required keyword-only arguments?: (.*)", str(error)):
            raise ExtraArgumentMissing(
                f"tx.update needs more than gradients, state and parameters, and was not given {missing[1]}. Pass "
                "it by name, as to tx.update: a fused step is step(params, state, *args, name=...)."
            ) from error
        if "got an unexpected keyword argument" in str(error):
            raise ValueError(
                f"tx.update must accept keyword arguments that it does not know, as Optax's do: {error}. Add "
                "**extra_args to it."
            ) from error
        if "MaskedNode" not in str(error):
            raise
        raise ValueError(
            "tx is given some leaves at a time, and optax.MaskedNode() in place of the others, but a mask or label "
            f"function in tx took one of these for a leaf ({error}). Write it with jax.tree.map or "
            "jax.tree_util.tree_map_with_path, or give a tree instead of a function."
        ) from error
    finally:
        _in_a_stack.reset(token)


def per_layer(tx: optax.GradientTransformation, layer_axes: LayerAxes) -> optax.GradientTransformationExtraArgs:
    """``tx``, applied to each layer of each stacked leaf as to a tensor of its own.

    Equals ``tx`` on the unstacked layers, with one state for all: state of a stacked leaf has a leading layer axis, and
    state that belongs to no leaf (a step count) is kept once. ``tx`` must treat leaves separately.

    Args:
      tx: any transformation that treats leaves separately, such as ``optax.adafactor(1e-3)``.
      layer_axes: for each leaf, the axis along which layers are stacked, or None if it is one tensor: a tree, a prefix
        of one, or a callable that makes it from the parameters. None for the whole option leaves ``tx`` as it is.

    Returns:
      A transformation.

    Raises:
      ValueError: ``tx`` is no transformation, or an axis is no integer; in ``init`` and ``update``, an axis is missing,
        is not an axis of its leaf or belongs to no leaf, or ``tx`` has ``layer_axes`` of its own for the same leaf.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from adalomo_jax import per_layer
      >>> params = {"layers": jnp.ones((12, 4, 4)), "head": jnp.ones((4, 2))}
      >>> tx = per_layer(optax.adafactor(1e-3), {"layers": 0, "head": None})
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> updates["layers"].shape
      (12, 4, 4)
    """
    check_transformation(tx)
    inner = optax.with_extra_args_support(tx)
    if layer_axes is None:
        return inner
    if not callable(layer_axes):
        entries_of(layer_axes)  # refuses bad entries now, not in init

    def lift(params: optax.Params) -> tuple[PerLayer, list[int | None], list[Any]]:
        axes = axes_of_leaves(params, layer_axes)
        if _in_a_stack.get() and any(axis is not None for axis in axes):
            raise ValueError(
                "layer_axes names layers within one layer of a stack. fuse, like an outer per_layer, gives tx one "
                "layer at a time: leave layer_axes out of tx."
            )
        leaves, treedef = jax.tree.flatten(params)
        stacks = [_layers_first(leaf, axis) for leaf, axis in zip(leaves, axes)]
        layers = [None if axis is None else stack.shape[0] for stack, axis in zip(stacks, axes)]
        tensors = [jax.ShapeDtypeStruct(s.shape if n is None else s.shape[1:], s.dtype) for s, n in zip(stacks, layers)]
        # One vmap runs over stacks of the same length and, on an explicit mesh, the same sharding of the layer axis.
        kinds = [(n, None if n is None else _layer_sharding(stack)) for n, stack in zip(layers, stacks)]
        groups = [Group(tuple(i for i, k in enumerate(kinds) if k == kind), kind[0]) for kind in dict.fromkeys(kinds)]
        return PerLayer(inner, treedef, tuple(tensors), tuple(groups)), axes, stacks

    def init(params: optax.Params) -> optax.OptState:
        lifted, _, stacks = lift(params)
        return lifted.init(stacks)

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args):
        lifted, axes, grads = lift(updates)
        leaves = None if params is None else [_layers_first(p, axis) for p, axis in zip(jax.tree.leaves(params), axes)]
        stacked, state = lifted.update_all(grads, state, leaves, **extra_args)
        moved = [u if axis is None else jnp.moveaxis(u, 0, axis) for u, axis in zip(stacked, axes)]
        return lifted.treedef.unflatten(moved), state

    return optax.GradientTransformationExtraArgs(init, update)


def _layers_first(leaf: Any, axis: int | None) -> Any:
    if axis is None:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda x: jnp.moveaxis(x, axis, 0), leaf)
    return jnp.moveaxis(leaf, axis, 0)


def _layer_sharding(stack: Any) -> Any:
    """The mesh axes over which the layers are spread, on an explicit mesh."""
    return None if isinstance(stack, jax.ShapeDtypeStruct) else jax.typeof(stack).sharding.spec[0]
