"""AdaLomo's arithmetic on one tensor, in the letters of the paper (https://arxiv.org/abs/2310.10195, algorithm 1).

    s = g**2 + eps                              m x n, the last two axes of the tensor, or those that are named
    r = beta r + (1 - beta) mean_n(s)           m
    c = beta c + (1 - beta) mean_m(s)           n
    v = r c / mean(r)                           never formed
    u = g / sqrt(v)
    u = u / max(1, RMS(u) / threshold)          grouped update normalization

Rows and columns may each span several axes: ``m`` and ``n`` are the products of these axes' sizes, and means are taken
over all of them at once, so nothing is transposed or reshaped. All other axes are batch axes of ``r`` and ``c``; RMS is
over the whole tensor. If ``g`` and theta are complex, squares are those of the magnitudes.

A step's memory traffic: RMS(u) depends on all of ``r`` and ``c``, so on every entry of ``g``, and the write depends on
RMS(u). So a step reads ``g`` at least three times: for sums, for RMS(u) and for the write. The write reads and writes
theta, and depends on RMS(theta), which takes one more read. In float32 these six accesses are 24 bytes a weight, if no
cache holds the matrix. No more are needed: ``r`` takes one read of ``g``, and one more is enough for both ``c`` and
RMS(u), because

    sum_ij u_ij**2 = mean(r) sum_j (sum_i g_ij**2 / r_i) / c_j

and both sums over ``i`` can be taken at once: `sums`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from adalomo_jax.optimizers.sums import LAST_TWO, Axes, squared, sums_over_rows


class FactoredMoment(NamedTuple):
    """The second moment of a tensor ``[..., m, n]`` as the means of its rows and of its columns, float32."""

    row: jax.Array
    """``[..., m]``, all axes except the columns: the moving average of ``mean(g**2, axis=columns)``."""
    col: jax.Array
    """``[..., n]``, all axes except the rows: the moving average of ``mean(g**2, axis=rows)``."""


Moment = FactoredMoment | jax.Array
"""The second moment of one tensor: factored or, with fewer than two axes, the moving average of ``g**2`` itself."""


def is_factored(shape: tuple[int, ...]) -> bool:
    """Whether a tensor has rows and columns to take means over; any size counts, except empty."""
    return len(shape) >= 2 and math.prod(shape) > 0


def new_share_at(t: jax.typing.ArrayLike, decay_rate: float | jax.Array) -> jax.Array:
    """``1 - beta_t = t**-decay_rate`` of the ``t``-th step, ``t = 1, 2, ...``: the first step keeps nothing old.

    It is the share of the new value, not beta itself, because in float32 1 - (1 - 0.005) has lost five digits.
    """
    return jnp.asarray(t, jnp.float32) ** -jnp.asarray(decay_rate, jnp.float32)


def rms(x: jax.Array) -> jax.Array:
    """The root of the mean square of all entries, in float32."""
    return jnp.sqrt(jnp.mean(squared(x)))


def row_and_col_means(s: jax.Array, axes: Axes = LAST_TWO) -> FactoredMoment:
    """``[..., m, n] -> [..., m], [..., n]``."""
    rows, columns = axes
    return FactoredMoment(row=jnp.mean(s, axis=columns), col=jnp.mean(s, axis=rows))


def accumulate(old: jax.Array, new: jax.Array, new_share: jax.Array) -> jax.Array:
    """``beta * old + (1 - beta) * new``; ``new_share`` is ``1 - beta``."""
    return (1.0 - new_share) * old + new_share * new


def inverse_root(moment: FactoredMoment, axes: Axes = LAST_TWO) -> tuple[jax.Array, jax.Array]:
    """``1 / sqrt(v)`` as a factor for each row and one for each column: ``sqrt(mean(r) / r)`` and ``1 / sqrt(c)``.

    Both have the rank of the tensor; axes that they lack have size 1.
    """
    rows, columns = axes
    r, c = jnp.expand_dims(moment.row, columns), jnp.expand_dims(moment.col, rows)
    # Not rsqrt(r / mean(r)): for a row without gradients the quotient may underflow, which makes the result infinite.
    return lax.rsqrt(r) * jnp.sqrt(jnp.mean(r, axis=rows, keepdims=True)), lax.rsqrt(c)


def precondition(x: jax.Array, moment: Moment, axes: Axes = LAST_TWO) -> jax.Array:
    """``x / sqrt(v)`` by a moment of the same tensor.

    >>> v = FactoredMoment(row=jnp.array([1.0, 1.0]), col=jnp.array([4.0, 16.0]))
    >>> precondition(jnp.ones((2, 2)), v).tolist()
    [[0.5, 0.25], [0.5, 0.25]]
    """
    if not isinstance(moment, FactoredMoment):
        return x * lax.rsqrt(moment)
    row_factor, col_factor = inverse_root(moment, axes)
    return x * row_factor * col_factor


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

    It equals ``clip_rms(precondition(g, v), threshold)`` with the new moment ``v``. A factored moment accumulates the
    means of the rows and columns of ``g**2 + eps``; any other accumulates ``g**2 + eps`` itself. ``new_share`` is
    ``1 - beta``.
    """
    # A float16 hyperparameter of 1e-30 is 0, and a zero gradient would be divided by 0.
    eps = jnp.maximum(eps, jnp.finfo(jnp.float32).tiny)
    if not isinstance(moment, FactoredMoment):
        v = accumulate(moment, squared(g) + eps, new_share)
        return clip_rms(precondition(g, v), threshold), v
    rows, columns = axes
    m = math.prod(g.shape[axis] for axis in rows)
    r = accumulate(moment.row, jnp.mean(squared(g), axis=columns) + eps, new_share)
    sums, sums_by_row = sums_over_rows(g, lax.rsqrt(r), axes)
    c = accumulate(moment.col, sums / m + eps, new_share)
    v = FactoredMoment(r, c)
    row_factor, col_factor = inverse_root(v, axes)
    row_factor = row_factor / jnp.maximum(1.0, _rms_of_update(v, sums_by_row, m, axes) / threshold)
    return g * row_factor * col_factor, v


def _rms_of_update(v: FactoredMoment, sums_by_row: jax.Array, m: int, axes: Axes) -> jax.Array:
    """``RMS(g / sqrt(v))`` without a read of ``g``, from the sums over ``i`` of ``g_ij**2 / r_i``."""
    rows, columns = axes
    mean_r = jnp.mean(jnp.expand_dims(v.row, columns), axis=rows, keepdims=True)
    per_column = jnp.expand_dims(sums_by_row, rows) / m
    return rms(jnp.sqrt(per_column) * jnp.sqrt(mean_r) * lax.rsqrt(jnp.expand_dims(v.col, rows)))


def clip_rms(u: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """``u``, scaled down to ``RMS(u) = threshold`` if it is above: the grouped update normalization."""
    return u / jnp.maximum(1.0, rms(u) / threshold)
