"""Causal attention for a CPU: tiles of scores that stay in its caches, without keys that no query of a tile sees.

Letters in names of arrays: B batch, T position, Q position of a tile's queries, S position that they may see, N query
heads, K key and value heads, R rows of a tile (its queries times the heads that see the same keys), H width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adalomo_jax.barriers import after

TILES = 8
"""Tiles of a long sequence. The average tile sees little more than half the keys; more tiles make a larger program."""

_SMALLEST = 64
"""The fewest queries of a tile; fewer would be slow to multiply."""

_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


class _Tile(NamedTuple):
    queries: slice
    keys: slice
    """From the first key that any of the queries sees to the last."""


class Scores(NamedTuple):
    """How queries and keys give scores, and which keys a window leaves."""

    scale: float | None = None
    """The factor of the products; None is ``1 / sqrt(H)``."""
    softcap: float | None = None
    """Scores ``s`` become ``softcap * tanh(s / softcap)``."""
    window: int | None = None
    """How many positions a query sees, its own included."""
    is_windowed: jax.Array | None = None
    """Whether there is this window, traced; None if there is."""

    def factor(self, head_dim: int) -> float:
        return 1 / math.sqrt(head_dim) if self.scale is None else self.scale


PLAIN = Scores()
"""Scores as they are in most models, without a window."""


def capped(x: jax.Array, cap: float) -> jax.Array:
    """``cap * tanh(x / cap)``."""
    return cap * jnp.tanh(x / cap)


def is_seen(
    queries: jax.Array,
    keys: jax.Array,
    segments_BQ: jax.Array | None,
    segments_BS: jax.Array | None,
    window: int | jax.Array | None,
) -> jax.Array:
    """``[B or 1, 1, Q, S]``: whether each query sees each key, both given by their positions."""
    distance = queries[:, None] - keys[None]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    seen = seen[None, None]
    if segments_BQ is not None and segments_BS is not None:
        seen &= segments_BQ[:, None, :, None] == segments_BS[:, None, None, :]
    return seen


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def tiled_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None = None,
    scores: Scores = PLAIN,
) -> jax.Array:
    """`causal_attention` in at most 8 tiles of queries, or in tiles of 64 queries if that makes fewer.

    The residuals are the arguments, the result and one number a query, the logarithm of the sum of its exponentials.
    The backward pass computes the scores again.

    Source: Dao, FlashAttention-2 (2023), arXiv:2307.08691, section 3.1, with all keys of a tile at once.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, scores)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, scores):
    T, K = q_BTNH.shape[1], k_BTKH.shape[2]
    k_BKTH, v_BKTH = _heads_first(k_BTKH), _heads_first(v_BTKH)
    outs, log_sums = [], []
    for tile in _tiles(T, scores.window):
        q_BKRH = after(_rows(q_BTNH, tile, K), (outs[-1:], log_sums[-1:]))  # otherwise all tiles' scores are alive
        s_BKRS = _scores(q_BKRH, k_BKTH, tile, segments_BT, scores)
        highest = jnp.max(s_BKRS, axis=-1, keepdims=True)
        p_BKRS = jnp.exp(s_BKRS - highest)
        total = jnp.sum(p_BKRS, axis=-1, keepdims=True)
        out_BKRH = _dot("bkrs,bksh->bkrh", p_BKRS.astype(v_BTKH.dtype), v_BKTH[:, :, tile.keys])
        outs.append(_from_rows((out_BKRH / total).astype(q_BTNH.dtype), tile))
        log_sums.append(highest + jnp.log(total))
    out_BTNH = jnp.concatenate(outs, axis=1)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, segments_BT, out_BTNH, log_sums)


def _backward(scores, saved, d_out_BTNH):
    q_BTNH, k_BTKH, v_BTKH, segments_BT, out_BTNH, log_sums = saved
    (_, T, _, H), K, dtype = q_BTNH.shape, k_BTKH.shape[2], q_BTNH.dtype
    k_BKTH, v_BKTH = _heads_first(k_BTKH), _heads_first(v_BTKH)
    along_BTN1 = jnp.sum(out_BTNH.astype(jnp.float32) * d_out_BTNH.astype(jnp.float32), axis=-1, keepdims=True)
    d_k_BKTH = d_v_BKTH = jnp.zeros(k_BKTH.shape, jnp.float32)
    d_qs = []
    for tile, log_sum_BKR1 in zip(_tiles(T, scores.window), log_sums, strict=True):
        of_all = lambda x, tile=tile: jnp.pad(x, [(0, 0), (0, 0), (tile.keys.start, T - tile.keys.stop), (0, 0)])
        q_BKRH = after(_rows(q_BTNH, tile, K), (d_qs[-1:], d_k_BKTH, d_v_BKTH))
        d_out_BKRH = _rows(d_out_BTNH, tile, K)
        s_BKRS = _scores(q_BKRH, k_BKTH, tile, segments_BT, scores)
        p_BKRS = jnp.exp(s_BKRS - log_sum_BKR1)
        d_p_BKRS = _dot("bkrh,bksh->bkrs", d_out_BKRH, v_BKTH[:, :, tile.keys])
        d_s_BKRS = p_BKRS * (d_p_BKRS - _rows(along_BTN1, tile, K))
        if scores.softcap is not None:  # the derivative of the cap; what is not seen has p = 0
            d_s_BKRS *= jnp.where(p_BKRS > 0, 1 - (s_BKRS / scores.softcap) ** 2, 0)
        d_s_BKRS = d_s_BKRS.astype(dtype)
        d_qs.append(_from_rows(_dot("bkrs,bksh->bkrh", d_s_BKRS, k_BKTH[:, :, tile.keys]), tile))
        d_k_BKTH += of_all(_dot("bkrs,bkrh->bksh", d_s_BKRS, q_BKRH))
        d_v_BKTH += of_all(_dot("bkrs,bkrh->bksh", p_BKRS.astype(dtype), d_out_BKRH))
    scale = scores.factor(H)
    d_q_BTNH = scale * jnp.concatenate(d_qs, axis=1)
    d_k_BTKH, d_v_BTKH = scale * jnp.swapaxes(d_k_BKTH, 1, 2), jnp.swapaxes(d_v_BKTH, 1, 2)
    return d_q_BTNH.astype(dtype), d_k_BTKH.astype(k_BTKH.dtype), d_v_BTKH.astype(v_BTKH.dtype), None


tiled_attention.defvjp(_forward, _backward)


def _tiles(T: int, window: int | None) -> Iterator[_Tile]:
    size = max(_SMALLEST, math.ceil(T / TILES))
    for first in range(0, T, size):
        end = min(first + size, T)
        yield _Tile(slice(first, end), slice(0 if window is None else max(0, first - window + 1), end))


def _scores(
    q_BKRH: jax.Array, k_BKTH: jax.Array, tile: _Tile, segments_BT: jax.Array | None, scores: Scores
) -> jax.Array:
    """``[B, K, R, S]`` in float32: the lowest float32 if the query does not see the key."""
    s_BKRS = _dot("bkrh,bksh->bkrs", q_BKRH, k_BKTH[:, :, tile.keys]) * scores.factor(q_BKRH.shape[-1])
    if scores.softcap is not None:
        s_BKRS = capped(s_BKRS, scores.softcap)
    queries, keys = (jnp.arange(of.start, of.stop) for of in (tile.queries, tile.keys))
    segments_BQ, segments_BS = (None if segments_BT is None else segments_BT[:, of] for of in (tile.queries, tile.keys))
    seen_B1QS = is_seen(queries, keys, segments_BQ, segments_BS, scores.window)
    groups = s_BKRS.shape[2] // seen_B1QS.shape[2]
    return jnp.where(jnp.tile(seen_B1QS, (1, 1, groups, 1)), s_BKRS, jnp.finfo(jnp.float32).min)


def _heads_first(x_BTKH: jax.Array) -> jax.Array:
    return jnp.swapaxes(x_BTKH, 1, 2)


def _rows(x_BTNH: jax.Array, tile: _Tile, K: int) -> jax.Array:
    """``[B, K, R, H]`` of a tile: the queries of all heads that see the same keys form one matrix."""
    x_BQNH = x_BTNH[:, tile.queries]
    B, Q, _, H = x_BQNH.shape
    return jnp.moveaxis(x_BQNH.reshape(B, Q, K, -1, H), 1, 3).reshape(B, K, -1, H)


def _from_rows(x_BKRH: jax.Array, tile: _Tile) -> jax.Array:
    """``[B, Q, N, H]`` of a tile, from its rows."""
    B, K, _, H = x_BKRH.shape
    Q = tile.queries.stop - tile.queries.start
    return jnp.moveaxis(x_BKRH.reshape(B, K, -1, Q, H), 3, 1).reshape(B, Q, -1, H)
