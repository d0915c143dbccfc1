"""Weights in three bytes: bfloat16 with 8 more bits, so that float32's range and 16 bits of precision are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding

from adalomo_jax.optimizers.kept import Kept, encode_tree
from adalomo_jax.optimizers.rounding import hashed_bits

_TAKEN = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


@partial(jax.tree_util.register_dataclass, data_fields=["high", "low"], meta_fields=["dtype"])
@dataclass(frozen=True, repr=False, eq=False)
class Float24(Kept):
    """float32 without its 8 lowest bits. `float24` makes them."""

    name = "bf16+8"

    high: jax.Array
    """uint16: the bits of the float, cut to bfloat16."""
    low: jax.Array
    """uint8: the next 8 bits."""
    dtype: Any
    """The dtype of the floats: float32, or bfloat16, which the loss then gets, rounded to nearest."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.high.shape)

    @property
    def form(self) -> str:
        return "bfloat16 with 8 more bits"

    @property
    def sharding(self) -> Any:
        return None if isinstance(self.high, Tracer) else getattr(self.high, "sharding", None)

    def spread(self, sharding: NamedSharding) -> Self:
        return jax.tree.map(lambda _: sharding, self)

    def floats(self) -> jax.Array:
        return self._in_float32().astype(self.dtype)

    def _in_float32(self) -> jax.Array:
        bits = (self.high.astype(jnp.uint32) << 16) | (self.low.astype(jnp.uint32) << 8)
        return lax.bitcast_convert_type(bits, jnp.float32)

    def add(self, update: jax.Array, key: jax.Array | None) -> Self:
        new = self._in_float32() + update.astype(jnp.float32)
        rounded = _cut(new, key, self.dtype)
        ok = jnp.isfinite(new) & jnp.isfinite(rounded.floats())
        return jax.tree.map(partial(jnp.where, ok), rounded, self)


def float24(params: Any, *, where: Any | Callable[[str], bool] | None = None) -> Any:
    """The tree with some of its floats in three bytes each, `Float24`, for a step that `adalomo_jax.fuse` makes.

    They have float32's range and 16 bits of precision, eight more than bfloat16. The loss and ``tx`` get floats of the
    dtype that the weights had: bfloat16 weights gain the bits that updates need to add up.

    Args:
      params: a tree of arrays or ``jax.ShapeDtypeStruct``s.
      where: which to encode: a function of a path such as ``"layers/up"``, or a tree of bools like ``params`` or a
        prefix of it. None chooses the float32 and bfloat16 arrays that have at least one axis.

    Returns:
      A tree like ``params``. `floats` is the way back.

    Raises:
      ValueError: nothing is chosen, or ``where`` selects an array that holds no floats.

    Example:
      >>> import jax.numpy as jnp
      >>> from adalomo_jax import float24, floats
      >>> params = float24({"w": jnp.full((2, 3), 0.1)})
      >>> print(params["w"], f"{floats(params)['w'][0, 0]:.6f}")
      Float24(float32[2, 3]) 0.100000
    """
    return encode_tree(params, encode, lambda x: x.ndim >= 1 and x.dtype in _TAKEN, where)


def encode(x: jax.Array) -> Float24:
    """One array of floats in three bytes a weight, rounded to nearest."""
    return _cut(x.astype(jnp.float32), None, x.dtype)


def _cut(x: jax.Array, key: jax.Array | None, dtype: Any) -> Float24:
    """The upper 24 bits: rounded at random with a key, so that the mean is right, otherwise to nearest."""
    x = jnp.where(jnp.abs(x) < jnp.finfo(jnp.float32).smallest_normal, 0, x)  # which some processors do by themselves
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    # Adding to the bits adds to the magnitude. To nearest, ties go away from zero.
    bits = bits + (jnp.uint32(0x80) if key is None else hashed_bits(key, x.shape) >> 24)
    return Float24((bits >> 16).astype(jnp.uint16), (bits >> 8).astype(jnp.uint8), jnp.dtype(dtype))
