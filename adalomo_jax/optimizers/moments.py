"""AdaLomo's arithmetic on one tensor, in the letters of the paper (https://arxiv.org/abs/2310.10195, algorithm 1).

    s = g**2 + eps                              m x n, the last two axes of the tensor
    r = beta r + (1 - beta) mean_n(s)           m
    c = beta c + (1 - beta) mean_m(s)           n
    v = r c / mean(r)                           never formed
    u = g / sqrt(v)
    u = u / max(1, RMS(u) / threshold)          grouped update normalization

Axes before the last two are batch axes of ``r`` and ``c``; RMS is over the whole tensor.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class FactoredMoment(NamedTuple):
    """The second moment of a tensor ``[..., m, n]`` as the means of its rows and of its columns, float32."""

    row: jax.Array
    """``[..., m]``: the moving average of ``mean(g**2, axis=-1)``."""
    col: jax.Array
    """``[..., n]``: the moving average of ``mean(g**2, axis=-2)``."""


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
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def row_and_col_means(s: jax.Array) -> FactoredMoment:
    """``[..., m, n] -> [..., m], [..., n]``."""
    return FactoredMoment(row=jnp.mean(s, axis=-1), col=jnp.mean(s, axis=-2))


def accumulate(moment: Moment, g: jax.Array, new_share: jax.Array, eps: float | jax.Array) -> Moment:
    """The moment after a step: ``beta * moment + (1 - beta) * statistics(g**2 + eps)``.

    ``new_share`` is ``1 - beta``. The statistics are the means of rows and columns, or of an unfactored tensor the
    squares themselves.
    """
    # A float16 hyperparameter of 1e-30 is 0, and a zero gradient would be divided by it.
    s = jnp.square(g) + jnp.maximum(eps, jnp.finfo(jnp.float32).tiny)
    statistics = row_and_col_means(s) if isinstance(moment, FactoredMoment) else s
    return jax.tree.map(lambda old, new: (1.0 - new_share) * old + new_share * new, moment, statistics)


def precondition(moment: Moment, g: jax.Array) -> jax.Array:
    """``g / sqrt(v)``, with ``v[..., i, j] = r[..., i] c[..., j] / mean(r)[...]`` for a factored moment."""
    if not isinstance(moment, FactoredMoment):
        return g * lax.rsqrt(moment)
    r, c = moment
    # Not rsqrt(r / mean(r)): of a row without gradients the quotient may underflow, and its root be infinite.
    row_factor = lax.rsqrt(r) * jnp.sqrt(jnp.mean(r, axis=-1, keepdims=True))
    return g * row_factor[..., :, None] * lax.rsqrt(c)[..., None, :]


def clip_rms(u: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """``u``, scaled down to ``RMS(u) = threshold`` where it is above: the grouped update normalization."""
    return u / jnp.maximum(1.0, rms(u) / threshold)
