"""A decoder's forward pass in parts: new positions see the keys and values of earlier ones in a cache.

Letters in names of arrays: as in `decoder`; S new positions, T positions that the cache has room for.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adalomo_jax.models.attention import cached_attention
from adalomo_jax.models.block import Block
from adalomo_jax.models.decoder import Decoder
from adalomo_jax.models.positions import Positions
from adalomo_jax.models.tiled_attention import Scores
from adalomo_jax.optimizers.kept import floats


class Cache(NamedTuple):
    """Keys and values of the positions that a model has read."""

    k_LBTKH: jax.Array
    v_LBTKH: jax.Array
    length: jax.Array
    """How many positions have been read, an int32 scalar."""


def empty_cache(model: Decoder, batch_size: int, positions: int) -> Cache:
    """A cache with room for this many positions of each sequence, in the type of the model's weights."""
    config = model.config
    shape = (config.num_hidden_layers, batch_size, positions, config.num_key_value_heads, config.head_dim)
    of_values = lambda: jnp.zeros(shape, model.embed_tokens.embedding[...].dtype)
    return Cache(of_values(), of_values(), jnp.zeros((), jnp.int32))


def cached_hidden(model: Decoder, tokens_BS: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """``model.hidden`` of all tokens so far, but only at the new ones.

    Pass a prompt at once and generated text token by token; the parts may have any lengths.

    Args:
        model: the model.
        tokens_BS: token ids, which follow those already read.
        cache: an `empty_cache`, or the one that the last call returned. It must have room for the tokens. This is not
            checked, because the number of tokens read is known only when the program runs.

    Returns:
        The residual stream ``[B, S, D]`` after the last norm, and the cache with the new positions.

    Example:
        >>> from adalomo_jax.models import PRESETS
        >>> model = Decoder(PRESETS["tiny"], rngs=nnx.Rngs(0))
        >>> tokens = jnp.arange(8)[None]
        >>> _, cache = cached_hidden(model, tokens[:, :5], empty_cache(model, 1, 8))
        >>> x, cache = cached_hidden(model, tokens[:, 5:], cache)
        >>> bool(jnp.allclose(x, model.hidden(tokens)[:, 5:], atol=1e-5))
        True
    """
    config, first = model.config, cache.length
    S = tokens_BS.shape[1]
    positions = Positions(config, S, first=first, room=cache.k_LBTKH.shape[2])
    graphdef, layers = nnx.split(model.layers)

    def run_layer(x_BSD, layer_and_cache):
        layer, traits, k_BTKH, v_BTKH = layer_and_cache
        at = positions.of_layer(traits)
        block: Block = nnx.merge(graphdef, floats(layer))
        q_BSNH, k_BSKH, v_BSKH = block.self_attn.project(block.read(x_BSD), at)
        k_BTKH, v_BTKH = _write(k_BTKH, k_BSKH, first), _write(v_BTKH, v_BSKH, first)
        scores = Scores(config.attention_scale, config.attention_softcap, config.sliding_window, at.is_windowed)
        out_BSNH = cached_attention(q_BSNH, k_BTKH, v_BTKH, first, scores)
        x_BSD, _ = block.add(x_BSD, block.self_attn.join(out_BSNH))
        return x_BSD, (k_BSKH, v_BSKH)

    inputs = (layers, positions.traits, cache.k_LBTKH, cache.v_LBTKH)
    x_BSD, (k_LBSKH, v_LBSKH) = jax.lax.scan(run_layer, model.embed(tokens_BS), inputs)
    # Only the new positions leave the scan: if it stacked the whole cache, each token would copy it.
    k_LBTKH, v_LBTKH = (_write(old, new, first) for old, new in ((cache.k_LBTKH, k_LBSKH), (cache.v_LBTKH, v_LBSKH)))
    return model.norm(x_BSD), Cache(k_LBTKH, v_LBTKH, first + S)


def _write(cached: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
    """The cached array with the new positions in their places, on the axis before the heads."""
    return jax.lax.dynamic_update_slice_in_dim(cached, new, first, axis=cached.ndim - 3)
