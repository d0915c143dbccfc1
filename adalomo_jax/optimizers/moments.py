"""AdaLomo's arithmetic on one tensor, in the letters of the paper (https://arxiv.org/abs/2310.10195, algorithm 1).

    s = g**2 + eps                              m x n, the last two axes of the tensor, or those that are named
    r = beta r + (1 - beta) mean_n(s)           m
    c = beta c + (1 - beta) mean_m(s)           n
    v = r c / mean(r)                           never formed
    u = g / sqrt(v)
    u = u / max(1, RMS(u) / threshold)          grouped update normalization

Rows, and columns, may lie on several axes: ``m`` and ``n`` are the products of these, and means are taken over all of
them at once, so nothing is transposed or reshaped. All other axes are batch axes of ``r`` and ``c``; RMS is over the
whole tensor. Of complex ``g`` and theta squares are those of magnitudes.

What a step must move: RMS(u) depends on all of ``r`` and ``c``, so on every entry of ``g``, and the write depends on
RMS(u). So ``g`` is read three times at least: for sums, for RMS(u), for the write. The write reads and writes theta,
and depends on RMS(theta), which is a read more. In float32 these six are 24 bytes a weight, where no cache holds the
matrix. No more are needed: ``r`` takes one read of ``g``, and then one is enough for both ``c`` and RMS(u), because

    sum_ij u_ij**2 = mean(r) sum_j (sum_i g_ij**2 / r_i) / c_j

and both sums over ``i`` can be taken at once.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Axes = tuple[tuple[int, ...], tuple[int, ...]]
"""Of a tensor the axes that are the rows of a matrix, and those that are its columns; all others are batch axes."""

LAST_TWO: Axes = ((-2,), (-1,))


class FactoredMoment(NamedTuple):
    """The second moment of a tensor ``[..., m, n]`` as the means of its rows and of its columns, float32."""

    row: jax.Array
    """``[..., m]``, all axes but the columns: the moving average of ``mean(g**2, axis=columns)``."""
    col: jax.Array
    """``[..., n]``, all axes but the rows: the moving average of ``mean(g**2, axis=rows)``."""


Moment = FactoredMoment | jax.Array
"""Of one tensor: factored, or, of a tensor with fewer than two axes, the moving average of ``g**2`` itself."""


def is_factored(shape: tuple[int, ...]) -> bool:
    """Whether a tensor has rows and columns to take means over; there is no smallest size but empty."""
    return len(shape) >= 2 and math.prod(shape) > 0


def new_share_at(t: jax.typing.ArrayLike, decay_rate: float | jax.Array) -> jax.Array:
    """``1 - beta_t = t**-decay_rate`` of the ``t``-th step, ``t = 1, 2, ...``: the first step keeps nothing old.

    The share of the new, not beta itself: in float32, 1 - (1 - 0.005) has lost five digits.
    """
    return jnp.asarray(t, jnp.float32) ** -jnp.asarray(decay_rate, jnp.float32)


def rms(x: jax.Array) -> jax.Array:
    """The root of the mean square of all entries, in float32."""
    return jnp.sqrt(jnp.mean(squared(x)))


def squared(x: jax.Array) -> jax.Array:
    """``|x|**2`` of each entry, in float32."""
    if jnp.iscomplexobj(x):
        return squared(x.real) + squared(x.imag)
    return jnp.square(x.astype(jnp.float32))


def row_and_col_means(s: jax.Array, axes: Axes = LAST_TWO) -> FactoredMoment:
    """``[..., m, n] -> [..., m], [..., n]``."""
    rows, columns = axes
    return FactoredMoment(row=jnp.mean(s, axis=columns), col=jnp.mean(s, axis=rows))


def accumulate(old: jax.Array, new: jax.Array, new_share: jax.Array) -> jax.Array:
    """``beta * old + (1 - beta) * new``; ``new_share`` is ``1 - beta``."""
    return (1.0 - new_share) * old + new_share * new


def normalized_update(
    moment: Moment,
    g: jax.Array,
    new_share: jax.Array,
    *,
    axes: Axes = LAST_TWO,
    eps: float | jax.Array = 1e-30,
    threshold: float | jax.Array = 1.0,
) -> tuple[jax.Array, Moment]:
    """``u`` and the moment after a step with the gradient ``g``, float32 or complex64: the equations above.

    The moment of a factored tensor is moved by the means of the rows and columns of ``g**2 + eps``, that of another one
    by ``g**2 + eps`` itself. ``new_share`` is ``1 - beta``.
    """
    # A float16 hyperparameter of 1e-30 is 0, and a zero gradient would be divided by it.
    eps = jnp.maximum(eps, jnp.finfo(jnp.float32).tiny)
    if not isinstance(moment, FactoredMoment):
        v = accumulate(moment, squared(g) + eps, new_share)
        return clip_rms(g * lax.rsqrt(v), threshold), v
    rows, columns = axes
    m = math.prod(g.shape[axis] for axis in rows)
    r = accumulate(moment.row, jnp.mean(squared(g), axis=columns) + eps, new_share)
    squares, squares_by_row = _sums_over_rows(g, lax.rsqrt(r), axes)
    c = accumulate(moment.col, squares / m + eps, new_share)
    # From here on all have the rank of g, with axes of size 1.
    r_1, c_1, squares_by_row = (jnp.expand_dims(*x) for x in ((r, columns), (c, rows), (squares_by_row, rows)))
    # Not rsqrt(r / mean(r)): of a row without gradients the quotient may underflow, and its root be infinite.
    root_of_mean = jnp.sqrt(jnp.mean(r_1, axis=rows, keepdims=True))
    row_factor, col_factor = lax.rsqrt(r_1) * root_of_mean, lax.rsqrt(c_1)
    rms_u = rms(jnp.sqrt(squares_by_row / m) * root_of_mean * col_factor)
    row_factor = row_factor / jnp.maximum(1.0, rms_u / threshold)
    return g * row_factor * col_factor, FactoredMoment(r, c)


def clip_rms(u: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """``u``, scaled down to ``RMS(u) = threshold`` where it is above: the grouped update normalization."""
    return u / jnp.maximum(1.0, rms(u) / threshold)


def _sums_over_rows(g: jax.Array, row_factor: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """``sum_i g_ij**2`` and ``sum_i (row_factor_i g_ij)**2``, ``[..., n]``, in one pass over ``g``."""
    one, two, pair = (_over(axes, sums) for sums in (sums_as_one, sums_as_two, sums_as_pair))
    return lax.platform_dependent(g, row_factor, cpu=one, tpu=two, default=pair)


@cache
def _over(axes: Axes, sums: Callable[..., Any]) -> Callable[..., Any]:
    """The same function each time: JAX traces one that it knows once for each shape."""
    return partial(sums, axes=axes)


def sums_as_two(g: jax.Array, row_factor: jax.Array, axes: Axes = LAST_TWO) -> tuple[jax.Array, jax.Array]:
    """The sums over rows for XLA's compiler for TPUs, which makes one pass of the two."""
    rows, columns = axes
    return jnp.sum(squared(g), rows), jnp.sum(squared(g * jnp.expand_dims(row_factor, columns)), rows)


def sums_as_pair(g: jax.Array, row_factor: jax.Array, axes: Axes = LAST_TWO) -> tuple[jax.Array, jax.Array]:
    """The sums over rows for the compiler for GPUs, which makes two passes of two sums within a training step."""
    rows, columns = axes
    zero = jnp.zeros([], jnp.float32)
    terms = squared(g), squared(g * jnp.expand_dims(row_factor, columns))
    return lax.reduce(terms, (zero, zero), _add_pairs, [axis % g.ndim for axis in rows])


def _add_pairs(old: tuple[Any, Any], new: tuple[Any, Any]) -> tuple[Any, Any]:
    """One function for all sums, by which `lax.reduce` is known to be the same in two programs."""
    return old[0] + new[0], old[1] + new[1]


def sums_as_one(g: jax.Array, row_factor: jax.Array, axes: Axes = LAST_TWO) -> tuple[jax.Array, jax.Array]:
    """The sums over rows for the compiler for CPUs, which would make two passes, and write ``g**2`` for them first."""
    rows, columns = axes
    # Which of the two sums it is, is an axis before the last one.
    of_both = lambda x: jnp.expand_dims(x, -2)
    factors = jnp.where(jnp.array([[False], [True]]), of_both(jnp.expand_dims(row_factor, columns)), 1.0)
    last = g.ndim - 1
    over = [axis + (axis == last) for axis in (axis % g.ndim for axis in rows)]
    sums = jnp.sum(squared(of_both(g) * factors), over)
    position = last - sum(axis < last for axis in over)
    return lax.index_in_dim(sums, 0, position, keepdims=False), lax.index_in_dim(sums, 1, position, keepdims=False)
