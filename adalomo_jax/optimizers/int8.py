"""Weights in one byte: int8 values, with a float32 scale for each block of neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from adalomo_jax.jax_versions import explicit_sharding
from adalomo_jax.optimizers.kept import Kept, encode_tree
from adalomo_jax.optimizers.rounding import hashed_bits

_MOST = 127
"""The largest value. The grid is symmetric: -128 is not used."""
_TINY = 2.0**-126
"""The smallest scale: a block of zeros has it, and float32 has no smaller normal number."""


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["block", "dtype"])
@dataclass(frozen=True, repr=False)
class Int8(Kept):
    """Floats as ``values * scales``, in one byte and a bit each. `int8` makes them."""

    name = "int8"

    values: jax.Array
    """int8, from -127 to 127, of the floats' shape."""
    scales: jax.Array
    """float32: along one axis an entry for each block of `block` neighbours, along the others for each entry."""
    block: int
    dtype: Any  # of the floats

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def form(self) -> str:
        along = "" if self.axis is None else f" along axis {self.axis - self.ndim}"
        return f"int8 in blocks of {self.block}{along}"

    @property
    def sharding(self) -> Any:
        return getattr(self.values, "sharding", None)

    @property
    def axis(self) -> int | None:
        """The axis that is cut into blocks; None if each entry has its own scale."""
        pairs = enumerate(zip(self.values.shape, self.scales.shape, strict=True))
        return next((axis for axis, (n, blocks) in pairs if n != blocks), None)

    def floats(self) -> jax.Array:
        return self._in_float32().astype(self.dtype)

    def add(self, update: jax.Array, key: jax.Array | None) -> Self:
        update = update.astype(jnp.float32)
        old, wide = self.values.astype(jnp.float32), self._spread(self.scales)
        new = old * wide + update
        update = jnp.where(jnp.isfinite(new), update, 0)
        new = jnp.where(jnp.isfinite(new), new, old * wide)
        # A scale stays until its block outgrows it: a new one moves the grid under all weights of the block.
        largest = self._largest(jnp.abs(new))
        outgrown = largest > _MOST * self.scales
        scales = jnp.where(outgrown, largest / _MOST, self.scales)
        in_units = jnp.where(self._spread(outgrown), new / self._spread(scales), old + update / wide)
        return self._replace(_rounded(in_units, key), scales)

    def _in_float32(self) -> jax.Array:
        return self.values.astype(jnp.float32) * self._spread(self.scales)

    def _spread(self, of_blocks: jax.Array) -> jax.Array:
        """Each block's entry for each of its weights."""
        axis = self.axis
        if axis is None:
            return of_blocks
        n, sharding = self.shape[axis], explicit_sharding(self.values)
        shape = (*of_blocks.shape[: axis + 1], self.block, *of_blocks.shape[axis + 1 :])
        rows = lax.broadcast_in_dim(of_blocks, shape, [a for a in range(len(shape)) if a != axis + 1])
        wide = (*of_blocks.shape[:axis], of_blocks.shape[axis] * self.block, *of_blocks.shape[axis + 1 :])
        return lax.slice_in_dim(lax.reshape(rows, wide, out_sharding=sharding), 0, n, axis=axis)

    def _largest(self, xs: jax.Array) -> jax.Array:
        """The largest entry of each block."""
        return _largest(xs, self.block, self.axis)

    def _replace(self, values: jax.Array, scales: jax.Array) -> Self:
        return type(self)(values, scales, self.block, self.dtype)


def int8(params: Any, *, block: int = 128, axis: int = -2, where: Any | Callable[[str], bool] | None = None) -> Any:
    """The tree with some of its floats in one byte each, `Int8`, for a step that `adalomo_jax.fuse` makes.

    Each block of ``block`` neighbours along one axis has a float32 scale: its largest magnitude over 127. A weight is
    rounded to the nearest of the 255 values of its block; 128 neighbours take 1.03 bytes each. The step then gives the
    loss and ``tx`` floats of the dtype that they had, adds each update in float32, and rounds it at random.

    Args:
      params: a tree of arrays or ``jax.ShapeDtypeStruct``s.
      block: the neighbours that share a scale; along a shorter axis, all of it.
      axis: the axis to cut into blocks, counted from the end. It must not be the layer axis of a stack.
      where: which to encode: a function of a path such as ``"layers/up"``, or a tree of bools like ``params`` or a
        prefix of it. None chooses the floats with three axes or more: stacks of matrices. Vectors, embeddings and heads
        stay as they are, and so do layers in a list: name their matrices, or encode what `FusedStep.place` returns.

    Returns:
      A tree like ``params``. `floats` is the way back.

    Raises:
      ValueError: ``block`` is less than 2, nothing is chosen, or ``where`` selects an array that holds no floats, or
        that has no such axis.

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
    block, axis = max(2, min(block, x.shape[axis])), axis + x.ndim
    wide = x.astype(jnp.float32)
    scales = jnp.maximum(_largest(jnp.abs(wide), block, axis) / _MOST, _TINY)
    empty = Int8(jnp.zeros(x.shape, jnp.int8), scales, block, jnp.dtype(x.dtype))
    return empty._replace(_rounded(wide / empty._spread(scales), None), scales)


def _largest(xs: jax.Array, block: int, axis: int | None) -> jax.Array:
    """The largest of each ``block`` entries along an axis; the last block may be shorter."""
    if axis is None:
        return xs
    n = xs.shape[axis]
    blocks = -(-n // block)
    if blocks * block != n:
        xs = lax.pad(
            xs, jnp.zeros([], xs.dtype), [(0, blocks * block - n if a == axis else 0, 0) for a in range(xs.ndim)]
        )
    return jnp.max(xs.reshape(*xs.shape[:axis], blocks, block, *xs.shape[axis + 1 :]), axis=axis + 1)


def _rounded(in_units: jax.Array, key: jax.Array | None) -> jax.Array:
    """Units of a scale as int8: at random with a key, so that the mean is right, otherwise to nearest."""
    if key is None:
        whole = jnp.round(in_units)
    else:
        # 16 bits: a whole number of up to 127 plus such a fraction is exact in float32, and rounds down to itself.
        fraction = (hashed_bits(key, in_units.shape) >> 16).astype(jnp.float32) * 2.0**-16
        whole = jnp.floor(in_units + fraction)
    return jnp.clip(whole, -_MOST, _MOST).astype(jnp.int8)
