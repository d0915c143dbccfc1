"""Weights in one byte: int8 values, with a bfloat16 scale for each block of neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from adalomo_jax.jax_versions import explicit_sharding
from adalomo_jax.optimizers.kept import Kept, encode_tree, pieces
from adalomo_jax.optimizers.rounding import hashed_bits

_MOST = 127
"""The largest value. The grid is symmetric: -128 is not used."""
_LARGEST = 120
"""A new scale gives this value to the largest weight of its block. So that can grow by 5.8% before the block needs
another scale, which rounds all weights of the block once more."""
_TINY = 2.0**-126
"""The smallest scale: a block of zeros has it, and float32 has no smaller normal number."""


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["axis", "size", "dtype"])
@dataclass(frozen=True, repr=False, eq=False)
class Int8(Kept):
    """Floats as ``values * scales``, in one byte and a bit each. `int8` makes them.

    The values have one axis more than the floats, one of which is cut into blocks and their entries. So a scale is
    broadcast over its block without a reshape, which XLA could not fuse into the write of a layer.
    """

    name = "int8"

    values: jax.Array
    """int8, from -127 to 127. The last block is filled up with zeros."""
    scales: jax.Array
    """bfloat16, one for each block, and for each entry of the other axes."""
    axis: int
    """The axis of the floats that is cut into blocks, counted from their last axis: -1 or less."""
    size: int
    """The size of the floats along it."""
    dtype: Any
    """The dtype of the floats."""

    @property
    def shape(self) -> tuple[int, ...]:
        at, shape = self.values.ndim - 1 + self.axis, self.values.shape
        return (*shape[:at], self.size, *shape[at + 2 :])

    @property
    def form(self) -> str:
        return f"int8 in blocks of {self.values.shape[self.axis]} along axis {self.axis}"

    @property
    def sharding(self) -> Any:
        sharding = None if isinstance(self.values, Tracer) else getattr(self.values, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return sharding
        entries = [*sharding.spec, *[None] * (self.values.ndim - len(sharding.spec))]
        del entries[self.axis]
        return sharding.update(spec=PartitionSpec(*entries))

    def floats(self) -> jax.Array:
        return self._decoded(_joined(self.values, self.axis, self.size), self.scales, self.axis)

    def layer_floats(self, i: Any, axis: int) -> jax.Array:
        if self.values.shape[self.axis] * self.values.shape[self.axis - 1] != self.size:
            return super().layer_floats(i, axis)
        # The whole stack without its blocks is no copy, and XLA fuses what is then done to a slice into products.
        values = lax.dynamic_index_in_dim(_joined(self.values, self.axis, self.size), i, axis, keepdims=False)
        scales = lax.dynamic_index_in_dim(self.scales, i, axis, keepdims=False)
        return self._decoded(values, scales, self.without_axis(axis).axis)

    def _decoded(self, values: jax.Array, scales: jax.Array, axis: int) -> jax.Array:
        blocks = jnp.expand_dims(scales.astype(jnp.float32), scales.ndim + 1 + axis)
        shape = [n if a != blocks.ndim + axis else self.values.shape[self.axis] for a, n in enumerate(blocks.shape)]
        wide = _joined(jnp.broadcast_to(blocks, shape), axis, self.size)
        return (values.astype(jnp.float32) * wide).astype(self.dtype)

    def add(self, update: jax.Array, key: jax.Array | None) -> Self:
        old, at = self.values.astype(jnp.float32), self.ndim + 1 + self.axis
        old_scales = jnp.expand_dims(self.scales.astype(jnp.float32), at)
        update = _cut(update.astype(jnp.float32), self.values.shape[self.axis], self.axis)
        update = jnp.where(jnp.isfinite((old * old_scales + update).astype(self.dtype)), update, 0)
        new = old * old_scales + update
        # A scale stays until its block outgrows it: a new one moves the grid under all weights of the block.
        largest = jnp.max(jnp.abs(new), axis=self.axis, keepdims=True)
        scales = jnp.where(largest > _MOST * old_scales, _scale(largest, self.dtype), old_scales)
        # Old values are whole: what is added to them alone is rounded, so that float32 loses nothing of it.
        start = jnp.where(scales > old_scales, 0, old)
        added = jnp.where(scales > old_scales, new / scales, update / old_scales)
        values = _as_int8(start + _rounded(added, key))
        return replace(self, values=values, scales=jnp.squeeze(scales, at).astype(jnp.bfloat16))

    def axis_in_parts(self, axis: int) -> tuple[int, int]:
        return axis + (axis > self.ndim + self.axis), axis

    def cuts(self, axis: int) -> bool:
        return axis == self.ndim + self.axis and self.values.shape[self.axis] > 1

    def without_axis(self, axis: int) -> Self:
        return replace(self, axis=self.axis + 1) if axis > self.ndim + self.axis else self

    def spread(self, sharding: NamedSharding) -> Self:
        at = self.ndim + self.axis
        names = _spread_names(sharding, self.shape, at, self.values.shape[at])
        of_values = sharding.update(spec=PartitionSpec(*names[: at + 1], None, *names[at + 1 :]))
        return replace(self, values=of_values, scales=sharding.update(spec=PartitionSpec(*names)))


def int8(params: Any, *, block: int = 128, axis: int = -2, where: Any | Callable[[str], bool] | None = None) -> Any:
    """The tree with some of its floats in one byte each, `Int8`, for a step that `adalomo_jax.fuse` makes.

    Each block of ``block`` neighbours along one axis has a bfloat16 scale, its largest magnitude over 120. A weight is
    an integer from -127 to 127 times the scale, at first the nearest; with blocks of 128 it takes 1.02 bytes. The step
    then gives the loss and ``tx`` floats of the dtype that they had, adds each update in float32, and rounds it at
    random.

    Args:
      params: a tree of arrays or ``jax.ShapeDtypeStruct``s.
      block: the most neighbours that share a scale. If a number from half of it on divides the axis, that is taken.
      axis: the axis to cut into blocks, counted from the end. It must not be the layer axis of a stack. A block is no
        longer than its axis, and a scale takes two bytes: if kernels have few heads before the last axis, take -1.
      where: which to encode: a function of a path such as ``"layers/up"``, or a tree of bools like ``params`` or a
        prefix of it. None chooses the floats with three axes or more: stacks of matrices, and kernels with an axis of
        heads. Vectors, embeddings and heads stay as they are, and so do matrices of layers in a list: name them, or
        encode what `FusedStep.place` returns.

    Returns:
      A tree like ``params``. `floats` is the way back.

    Raises:
      ValueError: ``block`` is less than 2, nothing is chosen, or ``where`` selects an array that holds no floats, or
        that has no such axis, or whose blocks would be so short that it takes as many bytes as before.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from adalomo_jax import adalomo, fuse, int8
      >>> layer = jax.checkpoint(lambda x, w: (x + jnp.tanh(x @ w), None))
      >>> loss_fn = lambda params, x: jnp.mean(jax.lax.scan(layer, x, params["layers"])[0] ** 2)
      >>> params, x = {"layers": 0.1 * jax.random.normal(jax.random.key(0), (12, 64, 64))}, jnp.ones((8, 64))
      >>> params = int8(params)
      >>> step = fuse(loss_fn, adalomo(1e-2))
      >>> state = step.init(params, x)
      >>> params, state, *_ = step.jit(params, state, x)
      >>> print(params["layers"], params["layers"].values.dtype)
      Int8(float32[12, 64, 64]) int8
    """
    if not isinstance(block, int) or isinstance(block, bool) or block < 2:
        raise ValueError(f"block must be an integer of at least 2, got {block!r}.")
    return encode_tree(params, partial(encode, block=block, axis=axis), lambda x: x.ndim >= 3, where)


def encode(x: jax.Array, *, block: int = 128, axis: int = -2) -> Int8:
    """One array of floats in one byte a weight, rounded to nearest."""
    axis = axis if x.ndim >= 2 else -1
    if not -x.ndim <= axis < 0:
        raise ValueError(f"axis must be from {-x.ndim} to -1 for an array of the shape {list(x.shape)}, got {axis}.")
    block = _block_of(x.shape[axis], block)
    if 1 + 2 / block >= x.dtype.itemsize:
        raise ValueError(
            f"blocks of {block} along axis {axis} take {1 + 2 / block:.2f} bytes a weight, and {x.dtype} takes "
            f"{x.dtype.itemsize}. Name a longer axis, such as axis=-1, or leave it out by where."
        )
    blocks = _cut(x.astype(jnp.float32), block, axis)
    scales = _scale(jnp.max(jnp.abs(blocks), axis=axis, keepdims=True), x.dtype)
    narrow = jnp.squeeze(scales, axis).astype(jnp.bfloat16)
    return Int8(_as_int8(_rounded(blocks / scales, None)), narrow, axis, x.shape[axis], jnp.dtype(x.dtype))


def _scale(largest: jax.Array, dtype: Any) -> jax.Array:
    """The scale of a block with this largest magnitude, float32 with the precision of bfloat16.

    It is never so large that 127 times it is infinite in the dtype of the floats.
    """
    info, most = jnp.finfo(jnp.bfloat16), 2.0 ** (jnp.finfo(dtype).maxexp - 7)
    return jnp.clip(lax.reduce_precision(largest / _LARGEST, info.nexp, info.nmant), _TINY, most)


def _block_of(size: int, most: int) -> int:
    """The size of a block: the largest from half of ``most`` on that divides the axis, or else ``most``."""
    most = max(1, min(most, size))
    return next((n for n in range(most, (most - 1) // 2, -1) if size % n == 0), most)


def _cut(x: jax.Array, block: int, axis: int) -> jax.Array:
    """The array with an axis cut in two, blocks and their entries. The last block is filled up with zeros."""
    at, missing, sharding = x.ndim + axis, -x.shape[axis] % block, explicit_sharding(x)
    blocks = (x.shape[axis] + missing) // block
    if sharding is not None:
        names = _spread_names(sharding, x.shape, at, blocks)
        x = jax.sharding.reshard(x, sharding.update(spec=PartitionSpec(*names)))
        sharding = sharding.update(spec=PartitionSpec(*names[: at + 1], None, *names[at + 1 :]))
    if missing:
        x = lax.pad(x, jnp.zeros([], x.dtype), [(0, missing if a == at else 0, 0) for a in range(x.ndim)])
    return lax.reshape(x, (*x.shape[:at], blocks, block, *x.shape[at + 1 :]), out_sharding=sharding)


def _spread_names(sharding: NamedSharding, shape: Sequence[int], at: int, blocks: int) -> list[Any]:
    """The mesh axes along each axis of the floats, so that each device has whole blocks along the axis ``at``.

    If they do not divide the blocks, another axis is spread over them: the largest that they divide.
    """
    names = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    parts = pieces(sharding.mesh, names[at])
    if blocks % parts == 0 and shape[at] % parts == 0:
        return names
    is_free = lambda a: a != at and pieces(sharding.mesh, names[a]) == 1 and shape[a] % parts == 0
    free = [a for a in range(max(len(shape) - 2, 0), len(shape)) if is_free(a)]
    for a in sorted(free, key=lambda a: shape[a])[-1:]:
        names[a] = names[at]
    names[at] = None
    return names


def _joined(blocks: jax.Array, axis: int, size: int) -> jax.Array:
    """The array that was cut into blocks, of this size along the axis."""
    at, shape, sharding = blocks.ndim - 1 + axis, blocks.shape, explicit_sharding(blocks)
    if sharding is not None:
        names = [*sharding.spec, *[None] * (blocks.ndim - len(sharding.spec))]
        sharding = sharding.update(spec=PartitionSpec(*names[: at + 1], *names[at + 2 :]))
    whole = (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])
    return lax.slice_in_dim(lax.reshape(blocks, whole, out_sharding=sharding), 0, size, axis=at)


def _rounded(in_units: jax.Array, key: jax.Array | None) -> jax.Array:
    """Whole units of a scale: at random with a key, so that the mean is right, otherwise to nearest."""
    if key is None:
        return jnp.round(in_units)
    # From 2**-24 to 1 - 2**-24, exact in float32: 0 stays 0, and small numbers of both signs are treated alike.
    fraction = ((hashed_bits(key, in_units.shape) >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return jnp.floor(in_units + fraction)


def _as_int8(whole: jax.Array) -> jax.Array:
    return jnp.clip(whole, -_MOST, _MOST).astype(jnp.int8)
