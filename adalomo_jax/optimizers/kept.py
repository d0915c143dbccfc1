"""Weights that are kept in another form than floats: in fewer bytes between the steps, as floats where they are used.

A form is a subclass of `Kept`, a pytree of arrays. A training step sees by the type what to do, as it does with
bfloat16: the loss and ``tx`` get floats, one layer of a stack at a time, and the update is written in that form.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Self, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding

from adalomo_jax.optimizers.choice import chosen_leaves


class Kept(abc.ABC):
    """Floats that are kept in another form.

    A subclass is a pytree of arrays, its parts. Each part has the axes of the floats in their order, and may have more.
    So one layer of a stack is one layer of each part, a stack of layers stacks each part, and a device holds a shard of
    each part.
    """

    name: ClassVar[str]
    """The form's name, as plans print it."""
    dtype: Any
    """The dtype of the floats."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the floats."""

    @property
    @abc.abstractmethod
    def form(self) -> str:
        """The form in words; layers of a list share a stack only if it is one for all."""

    @property
    @abc.abstractmethod
    def sharding(self) -> Any:
        """How the floats are spread over devices, and in which memory they are."""

    def astype(self, dtype: Any) -> Self:
        """The same weights, whose floats have another dtype."""
        return dataclasses.replace(cast(Any, self), dtype=jnp.dtype(dtype))

    @abc.abstractmethod
    def floats(self) -> jax.Array:
        """The floats, of `dtype`."""

    @abc.abstractmethod
    def add(self, update: jax.Array, key: jax.Array | None) -> Self:
        """The floats plus an update, in this form.

        The sum is taken in float32. It is rounded at random with ``key``, so that the mean over keys is the sum, or to
        nearest if ``key`` is None. A zero update changes no bit. An entry whose sum is not finite keeps its old value.
        """

    def layer_floats(self, i: Any, axis: int) -> jax.Array:
        """The floats of layer ``i`` of a stack, without the layer axis."""
        return take_layer(self, partial(lax.dynamic_index_in_dim, index=i, keepdims=False), axis).floats()

    def axis_in_parts(self, axis: int) -> tuple[int, ...]:
        """The axis of each part that is an axis of the floats; all are counted from the first."""
        return (axis,) * len(jax.tree.leaves(self))

    def cuts(self, axis: int) -> bool:
        """Whether neighbours along an axis of the floats, counted from the first, share anything."""
        return False

    def without_axis(self, axis: int) -> Self:
        """The same parts, described as they are to be once they have lost this axis of the floats."""
        return self

    @abc.abstractmethod
    def spread(self, sharding: NamedSharding) -> Self:
        """The shardings of the parts if the floats have this one."""

    @property
    def ndim(self) -> int:
        """The number of axes of the floats."""
        return len(self.shape)

    def __repr__(self) -> str:
        parts = jax.tree.leaves(self)
        if not parts or not all(hasattr(part, "shape") for part in parts):  # a tree of shardings, say
            return f"{type(self).__name__}({', '.join(map(repr, parts))})"
        return f"{type(self).__name__}({self.dtype}{list(self.shape)})"


def is_kept(x: Any) -> bool:
    """Whether ``x`` is a weight in another form, and not an array."""
    return isinstance(x, Kept)


def form_of(x: Any) -> str:
    """The form in which a weight is kept, in words; empty for an array."""
    return x.form if is_kept(x) else ""


def as_floats(x: Any) -> Any:
    """The floats of a weight in another form; any other array as it is."""
    return x.floats() if is_kept(x) else x


def take_layer(stack: Any, take: Callable[..., Any], axis: int, *, keepdims: bool = False) -> Any:
    """One layer of a stack of weights in any form: ``take(part, axis=axis)`` of each part, and the axis is gone.

    With ``keepdims`` it is not.
    """
    if not is_kept(stack):
        return take(stack, axis=axis)
    treedef = jax.tree.structure(stack if keepdims else stack.without_axis(axis))
    of_each = zip(jax.tree.leaves(stack), stack.axis_in_parts(axis), strict=True)
    return treedef.unflatten([take(part, axis=at) for part, at in of_each])


def put_layer(stack: Any, layer: Any, put: Callable[[Any, Any, int], Any], axis: int) -> Any:
    """A stack of weights in any form with one layer changed: ``put(part, part of the layer, axis)`` of each part."""
    if not is_kept(stack):
        return put(stack, layer, axis)
    parts, treedef = jax.tree.flatten(stack)
    of_each = zip(parts, jax.tree.leaves(layer), stack.axis_in_parts(axis), strict=True)
    return treedef.unflatten([put(part, new, at) for part, new, at in of_each])


def pieces(mesh: Any, names: Any) -> int:
    """Into how many pieces an axis is cut that is spread over these axes of a mesh."""
    return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))


def floats(params: Any) -> Any:
    """The tree with the floats of all weights that `int8` or `float24` has put in another form.

    Args:
      params: a tree of arrays and of `Int8` and `Float24`.

    Returns:
      The tree with arrays only. Under ``jax.jit`` only what is read of them is computed.

    Example:
      >>> import jax.numpy as jnp
      >>> from adalomo_jax import floats, int8
      >>> params = {"layers": jnp.ones((2, 4, 3)), "head": jnp.ones((3, 2))}
      >>> print(floats(int8(params))["layers"].dtype, floats(int8(params))["layers"].shape)
      float32 (2, 4, 3)
    """
    return jax.tree.map(lambda x: _decoded(x) if is_kept(x) else x, params, is_leaf=is_kept)


@jax.jit
def _decoded(x: Kept) -> jax.Array:
    """Operation by operation, there would be several float32 arrays."""
    return x.floats()


def encoded(x: Any, encode: Callable[[Any], Kept]) -> Any:
    """An array in another form; for its ``jax.ShapeDtypeStruct``, the description of that. It is spread as before."""
    shapes, sharding = jax.eval_shape(encode, x), getattr(x, "sharding", None)
    named = isinstance(sharding, NamedSharding)
    spread = shapes.spread(sharding) if named else jax.tree.map(lambda _: sharding, shapes)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.tree.map(lambda part, sharding: part.update(sharding=sharding), shapes, spread)

    def checked(x: jax.Array) -> tuple[Kept, jax.Array]:
        value = encode(x)
        return value, jnp.isfinite(x).all() & jnp.isfinite(value.floats()).all()

    value, is_finite = jax.jit(checked, out_shardings=(spread, None))(x)
    if not isinstance(is_finite, Tracer) and not is_finite:
        raise ValueError(
            "it has NaN, infinities or numbers that become infinite, which this form cannot hold. Mend them first."
        )
    return value


def encode_tree(
    params: Any, encode: Callable[[Any], Kept], chosen: Callable[[Any], bool], where: Any | Callable[[str], bool] | None
) -> Any:
    """The tree with some floats in another form.

    Args:
      params: a tree of arrays; weights that have a form already stay as they are.
      encode: makes the form of one array.
      chosen: whether to encode a leaf if ``where`` is None.
      where: a function of a path such as ``"layers/up"``, or a tree of bools like ``params`` or a prefix of it.
    """
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_kept)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths_and_leaves]
    leaves = [leaf for _, leaf in paths_and_leaves]
    if where is None:
        asked = [_holds_floats(leaf) and chosen(leaf) for leaf in leaves]
    else:
        asked = chosen_leaves("where", where, names, treedef)
    for name, leaf, is_asked in zip(names, leaves, asked, strict=True):
        if is_asked and not (_holds_floats(leaf) and leaf.ndim >= 1):
            raise ValueError(
                f"where selects arrays of floats with at least one axis, but {name!r} is "
                f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(getattr(leaf, 'shape', ()))}. Leave it out."
            )
    if not any(asked) and not any(map(is_kept, leaves)):
        raise ValueError(
            f"None of the {len(leaves)} leaves of params is {'chosen' if where is None else 'selected by where'}. "
            "Name those to keep in another form with where=lambda path: ..."
        )
    found = []
    for name, leaf, is_asked in zip(names, leaves, asked, strict=True):
        try:
            found.append(encoded(leaf, encode) if is_asked and not is_kept(leaf) else leaf)
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be kept in another form: {error}") from error
    return treedef.unflatten(found)


def _holds_floats(x: Any) -> bool:
    return is_kept(x) or (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating))
