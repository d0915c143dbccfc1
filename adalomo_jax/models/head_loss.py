"""The cross-entropy of a head's logits, one tile of the vocabulary after the other.

A loop over tokens would add up the gradient of the head in memory, once for each part of them, rounded each time. Here
each tile's gradient is complete at once, summed over all tokens inside one product. What is added up, in float32, is
the gradient of the stream, which is smaller.

Letters in names of arrays: B batch, T position, D residual stream, V vocabulary, W the width of a tile.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from adalomo_jax.models.tiled_attention import capped

HeadAxes = Literal["dv", "vd"]
"""The axes of the head, or of the embedding if that is also the head."""

_UNITS = (128, 8, 1)
"""Tiles are a multiple of the first of these wide with which little is computed twice: a TPU's registers have 128
columns and 8 rows."""


class Head(NamedTuple):
    """How a head's products give logits, and in tiles of which width."""

    axes: HeadAxes
    divisor: float = 1.0
    softcap: float | None = None
    """Logits ``s`` become ``softcap * tanh(s / softcap)``, after the division."""
    width: int | None = None
    """The most columns of a tile; None for all at once."""
    over: str | None = None
    """Under ``shard_map``: the mesh axis along which the vocabulary is cut."""

    @property
    def axis(self) -> int:
        """The head's axis of the vocabulary."""
        return self.axes.index("v")

    def logits(self, products: jax.Array) -> jax.Array:
        """The logits, from the head's products."""
        products = products if self.divisor == 1 else products / self.divisor
        return products if self.softcap is None else capped(products, self.softcap)

    def pulled_back(self, d_logits: jax.Array, logits: jax.Array) -> jax.Array:
        """The gradient of the products, from that of the logits."""
        if self.softcap is not None:
            d_logits = d_logits * (1 - (logits / self.softcap) ** 2)
        return d_logits if self.divisor == 1 else d_logits / self.divisor


def tile_width(vocabulary: int, most: int) -> int:
    """The width of tiles that cover the vocabulary: at most ``most``, and at most half a percent of it twice.

    >>> tile_width(32000, 4000), tile_width(151936, 18992), tile_width(1000, 1000)
    (3200, 16896, 1000)
    """
    if vocabulary <= max(most, _UNITS[0]):
        return vocabulary
    twice = lambda width: -(-vocabulary // width) * width - vocabulary
    fewest = -(-vocabulary // most)
    for unit in _UNITS:
        widths = {-(-vocabulary // (n * unit)) * unit for n in range(fewest, 2 * fewest + 1)}
        good = [width for width in widths if width <= most and twice(width) <= vocabulary // 200]
        if good:
            return max(good)
    return max(most, 1)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def head_loss(x_BTD: jax.Array, head: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, how: Head) -> jax.Array:
    """``sum(weights * -log(softmax(logits)[target]))`` in nats, a float32 scalar.

    One tile of the logits, ``[B, T, W]`` in float32, exists at a time, forward and backward. The backward pass computes
    it again, and rounds its gradient to the type of ``x`` before it is multiplied: float32 products would take twice a
    GPU's time or more. The sums inside of the products are float32.

    Args:
      x_BTD: the stream after the last norm.
      head: ``[D, V]`` or ``[V, D]``, as ``how.axes`` says.
      targets_BT: the token that each position predicts.
      weights_BT: float32; 0 for a position that predicts none.
      how: how the products give logits, and the width of the tiles.

    Returns:
      The sum; under ``shard_map`` with ``how.over`` this device's part of it, for a ``psum`` over that axis.
    """
    return _forward(x_BTD, head, targets_BT, weights_BT, how)[0]


class _Tile(NamedTuple):
    start: jax.Array
    columns_11W: jax.Array
    """The tokens whose logits are in the tile."""
    is_new_11W: jax.Array | None
    """Whether no tile before has the column; None if this holds for all. The last tile may begin before its place."""


def _forward(x_BTD, head, targets_BT, weights_BT, how):
    def step(sums, i):
        highest_BT, total_BT, picked_BT = sums
        tile = _tile_at(i, head, how)
        logits_BTW = how.logits(_products(x_BTD, _part(head, tile, how), how))
        is_target_BTW = tile.columns_11W == targets_BT[..., None]
        if tile.is_new_11W is not None:
            logits_BTW = jnp.where(tile.is_new_11W, logits_BTW, -jnp.inf)
            is_target_BTW &= tile.is_new_11W
        new_BT = jnp.maximum(highest_BT, jnp.max(logits_BTW, axis=-1))
        total_BT = total_BT * jnp.exp(highest_BT - new_BT) + jnp.sum(jnp.exp(logits_BTW - new_BT[..., None]), axis=-1)
        # A sum over a comparison, not a gather: XLA fuses it with what is around it.
        picked_BT += jnp.sum(jnp.where(is_target_BTW, logits_BTW, 0.0), axis=-1)
        return (new_BT, total_BT, picked_BT), None

    zeros_BT = jnp.zeros(targets_BT.shape, jnp.float32)
    first = (zeros_BT - jnp.inf, zeros_BT, zeros_BT)
    (highest_BT, total_BT, picked_BT), _ = _loop(step, first, head, how)
    devices = 1
    if how.over is not None:
        of_all_BT, devices = lax.pmax(highest_BT, how.over), lax.axis_size(how.over)
        total_BT = lax.psum(total_BT * jnp.exp(highest_BT - of_all_BT), how.over)
        highest_BT = of_all_BT
    log_sum_BT = highest_BT + jnp.log(total_BT)
    loss = jnp.sum((log_sum_BT / devices - picked_BT) * weights_BT)
    return loss, (x_BTD, head, targets_BT, weights_BT, log_sum_BT)


def _backward(how, saved, d_loss):
    x_BTD, head, targets_BT, weights_BT, log_sum_BT = saved
    scale_BT = d_loss * weights_BT

    def step(gradients, i):
        d_x_BTD, d_head = gradients
        tile = _tile_at(i, head, how)
        part = _part(head, tile, how)
        logits_BTW = how.logits(_products(x_BTD, part, how))
        is_target_BTW = tile.columns_11W == targets_BT[..., None]
        p_BTW = jnp.exp(logits_BTW - log_sum_BT[..., None])
        d_BTW = jnp.where(is_target_BTW, p_BTW - 1, p_BTW) * scale_BT[..., None]
        d_BTW = how.pulled_back(d_BTW, logits_BTW).astype(x_BTD.dtype)
        d_part = jnp.einsum(f"btd,btv->{how.axes}", x_BTD, d_BTW, preferred_element_type=jnp.float32)
        # Columns that an earlier tile has are written again, as they were, but add nothing to the stream's gradient.
        d_new_BTW = d_BTW if tile.is_new_11W is None else jnp.where(tile.is_new_11W, d_BTW, 0)
        d_x_BTD += jnp.einsum(f"btv,{how.axes}->btd", d_new_BTW, part, preferred_element_type=jnp.float32)
        d_head = lax.dynamic_update_slice_in_dim(d_head, d_part.astype(head.dtype), tile.start, how.axis)
        return (d_x_BTD, d_head), None

    first = (jnp.zeros(x_BTD.shape, jnp.float32), jnp.zeros(head.shape, head.dtype))
    (d_x_BTD, d_head), _ = _loop(step, first, head, how)
    return d_x_BTD.astype(x_BTD.dtype), d_head, None, None


head_loss.defvjp(_forward, _backward)


def _loop(step: Any, first: Any, head: jax.Array, how: Head) -> Any:
    """A scan over the tiles, or the step alone if there is one tile."""
    tiles = -(-head.shape[how.axis] // _width(head, how))
    return step(first, jnp.int32(0)) if tiles == 1 else lax.scan(step, first, jnp.arange(tiles))


def _width(head: jax.Array, how: Head) -> int:
    vocabulary = head.shape[how.axis]
    return vocabulary if how.width is None else tile_width(vocabulary, how.width)


def _tile_at(i: jax.Array, head: jax.Array, how: Head) -> _Tile:
    vocabulary, width = head.shape[how.axis], _width(head, how)
    start = jnp.minimum(i * width, vocabulary - width)
    columns_11W = start + jnp.arange(width)[None, None]
    is_new_11W = None if vocabulary % width == 0 else columns_11W >= i * width
    if how.over is not None:
        columns_11W += lax.axis_index(how.over) * vocabulary
    return _Tile(start, columns_11W, is_new_11W)


def _part(head: jax.Array, tile: _Tile, how: Head) -> jax.Array:
    if tile.columns_11W.size == head.shape[how.axis]:
        return head
    return lax.dynamic_slice_in_dim(head, tile.start, tile.columns_11W.size, how.axis)


def _products(x_BTD: jax.Array, part: jax.Array, how: Head) -> jax.Array:
    return jnp.einsum(f"btd,{how.axes}->btv", x_BTD, part, preferred_element_type=jnp.float32)
