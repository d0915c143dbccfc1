"""Two sums of squares over the rows of a matrix in one pass, in a form from which each compiler reads ``g`` once.

`moments` needs ``sum_i g_ij**2`` and ``sum_i (g_ij / sqrt(r_i))**2`` for each column. If these are written as two sums,
the compilers for CPUs and GPUs read ``g`` twice. So each backend has a form of its own that reads it once. All forms
give the same numbers, up to the order of the additions.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Axes = tuple[tuple[int, ...], tuple[int, ...]]
"""The axes of a tensor that are the rows of a matrix, and those that are its columns; the rest are batch axes."""

LAST_TWO: Axes = ((-2,), (-1,))


def squared(x: jax.Array) -> jax.Array:
    """``|x|**2`` of each entry, in float32."""
    if jnp.iscomplexobj(x):
        return squared(x.real) + squared(x.imag)
    return jnp.square(x.astype(jnp.float32))


def sums_over_rows(g: jax.Array, row_factor: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """``sum_i g_ij**2`` and ``sum_i (row_factor_i g_ij)**2``, ``[..., n]``, in one pass over ``g``."""
    one, two, pair = (_over(axes, sums) for sums in (sums_as_one, sums_as_two, sums_as_pair))
    return lax.platform_dependent(g, row_factor, cpu=one, tpu=two, default=pair)


@cache
def _over(axes: Axes, sums: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the same function object each time, so that JAX traces it only once for each shape."""
    return partial(sums, axes=axes)


def sums_as_two(g: jax.Array, row_factor: jax.Array, axes: Axes = LAST_TWO) -> tuple[jax.Array, jax.Array]:
    """The sums over rows for XLA's TPU compiler, which computes both in one pass."""
    rows, columns = axes
    return jnp.sum(squared(g), rows), jnp.sum(squared(g * jnp.expand_dims(row_factor, columns)), rows)


def sums_as_pair(g: jax.Array, row_factor: jax.Array, axes: Axes = LAST_TWO) -> tuple[jax.Array, jax.Array]:
    """The sums over rows for the GPU compiler, which computes two separate sums in two passes in a training step."""
    rows, columns = axes
    zero = jnp.zeros([], jnp.float32)
    terms = squared(g), squared(g * jnp.expand_dims(row_factor, columns))
    return lax.reduce(terms, (zero, zero), _add_pairs, [axis % g.ndim for axis in rows])


def _add_pairs(old: tuple[Any, Any], new: tuple[Any, Any]) -> tuple[Any, Any]:
    """One function for all sums: by it, JAX knows that a `lax.reduce` is the same in two programs."""
    return old[0] + new[0], old[1] + new[1]


def sums_as_one(g: jax.Array, row_factor: jax.Array, axes: Axes = LAST_TWO) -> tuple[jax.Array, jax.Array]:
    """The sums over rows for the CPU compiler, which would write ``g**2`` first and then make two passes over it."""
    rows, columns = axes
    # A new axis before the last one selects between the two sums.
    of_both = lambda x: jnp.expand_dims(x, -2)
    factors = jnp.where(jnp.array([[False], [True]]), of_both(jnp.expand_dims(row_factor, columns)), 1.0)
    last = g.ndim - 1
    over = [axis + (axis == last) for axis in (axis % g.ndim for axis in rows)]
    sums = jnp.sum(squared(of_both(g) * factors), over)
    position = last - sum(axis < last for axis in over)
    return lax.index_in_dim(sums, 0, position, keepdims=False), lax.index_in_dim(sums, 1, position, keepdims=False)
