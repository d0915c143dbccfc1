"""A mixture of experts: each token passes through the few gated MLPs that its router chose.

Letters in names of arrays: N tokens, K experts of a token, E experts, and as in `decoder` D and F.

The experts run one after the other, and each over its own tokens, a tile of rows at a time. So no array is larger than
the weights or the stream, no token is dropped, and each product is a plain one on all backends. XLA computes
``jax.lax.ragged_dot`` densely on CPUs and GPUs: each token by each expert, of which all but the chosen are masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Act = Callable[[jax.Array], jax.Array]


class Experts(NamedTuple):
    """The matrices of all experts of a layer, or of one, without the axis E; or how they are spread."""

    gate_EDF: Any
    up_EDF: Any
    down_EFD: Any


def choose(logits_NE: jax.Array, most: int, *, normalized: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The ``most`` likeliest experts of each token, their weights ``[N, K]``, and all probabilities ``[N, E]``.

    The weights are the probabilities, divided by their sum over the chosen ones if ``normalized``; float32.
    """
    probability_NE = jax.nn.softmax(logits_NE.astype(jnp.float32), axis=-1)
    weight_NK, expert_NK = lax.top_k(probability_NE, most)
    if normalized:
        weight_NK = weight_NK / jnp.sum(weight_NK, axis=-1, keepdims=True)
    return expert_NK, weight_NK, probability_NE


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def mixture(x_ND: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, experts: Experts, act: Act) -> jax.Array:
    """``sum over k of weight[n, k] * down[e](act(gate[e](x[n])) * up[e](x[n]))``, with ``e = expert[n, k]``.

    Args:
        x_ND: the tokens.
        expert_NK: the experts of each token, integers.
        weight_NK: the factors of their results, float32.
        experts: the matrices.
        act: the activation of the gate.

    Returns:
        ``[N, D]`` in the type of ``x_ND``; the sum over experts is float32.
    """
    rows = _Rows.of(expert_NK, weight_NK, experts)

    def run_expert(sum_ND, one):
        expert, start, count = one

        def run_tile(i, sum_ND):
            tile = rows.tile(start, count, i)
            gate, up = _gate_and_up(tile.read(x_ND), expert)
            out_MD = (act(gate) * up) @ expert.down_EFD
            return tile.add(sum_ND, tile.weight_M1 * out_MD.astype(jnp.float32))

        return lax.fori_loop(0, rows.tiles(count), run_tile, sum_ND), None

    zeros = jnp.zeros(x_ND.shape, jnp.float32)
    return lax.scan(run_expert, zeros, (experts, rows.start_E, rows.count_E))[0].astype(x_ND.dtype)


def _mixture_forward(x_ND, expert_NK, weight_NK, experts, act):
    return mixture(x_ND, expert_NK, weight_NK, experts, act), (x_ND, expert_NK, weight_NK, experts)


def _mixture_backward(act, residuals, d_ND):
    """Each expert's gradient is added up over its tiles in float32, and is complete when its turn ends."""
    x_ND, expert_NK, weight_NK, experts = residuals
    rows = _Rows.of(expert_NK, weight_NK, experts)

    def run_expert(sums, one):
        expert, start, count = one

        def run_tile(i, sums):
            d_x_ND, d_weight, d_expert = sums
            tile = rows.tile(start, count, i)
            x_MD, d_MD = tile.read(x_ND), tile.read(d_ND)
            h_MF, through_gate = jax.vjp(lambda gate, up: act(gate) * up, *_gate_and_up(x_MD, expert))
            d_h_MF = (d_MD @ expert.down_EFD.T).astype(jnp.float32)
            d_weight = tile.write(d_weight, jnp.sum(d_h_MF * h_MF.astype(jnp.float32), axis=-1))
            d_gate, d_up = through_gate((tile.weight_M1 * d_h_MF).astype(x_MD.dtype))
            d_x_MD = d_gate @ expert.gate_EDF.T + d_up @ expert.up_EDF.T
            weighted_MD = (tile.weight_M1 * d_MD.astype(jnp.float32)).astype(x_MD.dtype)
            of_tile = Experts(_outer(x_MD, d_gate), _outer(x_MD, d_up), _outer(h_MF, weighted_MD))
            d_x_ND = tile.add(d_x_ND, d_x_MD.astype(jnp.float32))
            return d_x_ND, d_weight, jax.tree.map(jnp.add, d_expert, of_tile)

        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), expert)
        *sums, d_expert = lax.fori_loop(0, rows.tiles(count), run_tile, (*sums, zeros))
        return tuple(sums), jax.tree.map(lambda d, w: d.astype(w.dtype), d_expert, expert)

    zeros = jnp.zeros(x_ND.shape, jnp.float32), jnp.zeros(weight_NK.size, jnp.float32)
    (d_x_ND, d_weight), d_experts = lax.scan(run_expert, zeros, (experts, rows.start_E, rows.count_E))
    return d_x_ND.astype(x_ND.dtype), None, d_weight.reshape(weight_NK.shape), d_experts


mixture.defvjp(_mixture_forward, _mixture_backward)


def _gate_and_up(x_MD: jax.Array, expert: Experts) -> tuple[jax.Array, jax.Array]:
    return x_MD @ expert.gate_EDF, x_MD @ expert.up_EDF


def _outer(x_MI: jax.Array, d_MO: jax.Array) -> jax.Array:
    """The gradient ``[I, O]`` of a matrix, float32, from a tile's inputs and the gradient of its results."""
    return jnp.einsum("mi,mo->io", x_MI, d_MO, preferred_element_type=jnp.float32)


class _Rows(NamedTuple):
    """All pairs of a token and one of its experts, expert by expert."""

    pair: jax.Array
    """The pairs' numbers ``n * K + k`` in the order of their experts; then zeros, as many as a tile has rows."""
    weight_NK: jax.Array
    start_E: jax.Array
    """The place of each expert's first pair."""
    count_E: jax.Array
    """How many pairs each expert has."""
    size: int
    """How many rows a tile has."""

    @classmethod
    def of(cls, expert_NK: jax.Array, weight_NK: jax.Array, experts: Experts) -> _Rows:
        E, flat = experts.gate_EDF.shape[0], expert_NK.reshape(-1)
        count_E = jnp.bincount(flat, length=E)
        size = _tile_size(flat.size, E)
        pair = jnp.pad(jnp.argsort(flat), (0, size))
        return cls(pair, weight_NK, jnp.cumsum(count_E) - count_E, count_E, size)

    def tiles(self, count: jax.Array) -> jax.Array:
        return (count + (self.size - 1)) // self.size

    def tile(self, start: jax.Array, count: jax.Array, i: jax.Array) -> _Tile:
        pair_M = lax.dynamic_slice_in_dim(self.pair, start + i * self.size, self.size)
        is_own_M1 = (i * self.size + jnp.arange(self.size) < count)[:, None]
        weight_M1 = jnp.where(is_own_M1, self.weight_NK.reshape(-1)[pair_M][:, None], 0)
        return _Tile(pair_M, pair_M // self.weight_NK.shape[1], weight_M1, is_own_M1)


class _Tile(NamedTuple):
    """As many pairs as pass through an expert at once. The last tile of an expert has rows that are not its own."""

    pair_M: jax.Array
    token_M: jax.Array
    weight_M1: jax.Array
    is_own_M1: jax.Array

    def read(self, x_ND: jax.Array) -> jax.Array:
        """The tokens' rows, and zeros for those that are not its own."""
        return jnp.where(self.is_own_M1, x_ND[self.token_M], jnp.zeros([], x_ND.dtype))

    def add(self, sum_ND: jax.Array, x_MD: jax.Array) -> jax.Array:
        """Adds each row to its token's; rows that are not its own must be zeros."""
        return sum_ND.at[self.token_M].add(x_MD)

    def write(self, flat: jax.Array, x_M: jax.Array) -> jax.Array:
        """Writes an entry of each own pair."""
        place_M = jnp.where(self.is_own_M1[:, 0], self.pair_M, flat.size)
        return flat.at[place_M].set(x_M, mode="drop")


def _tile_size(pairs: int, experts: int) -> int:
    """A power of two near half of the pairs that an expert has on average: a quarter of the rows is then in vain."""
    return min(max(16, 2 ** round(math.log2(max(1, pairs / experts / 2)))), 512)
