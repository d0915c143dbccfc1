"""Text from a model, one token after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adalomo_jax.models.llama import Llama


def generate(
    model: Llama, prompt_tokens_BP: jax.Array, length: int, *, key: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """Continue each prompt by ``length`` sampled tokens.

    Every token costs one forward pass over the whole window of ``P + length`` positions (no cache of keys and values).
    Jits with ``length`` and ``temperature`` static.

    Args:
        model: the model.
        prompt_tokens_BP: token ids ``[B, P]``, ``P >= 1``.
        length: tokens to add; ``P + length`` may not exceed ``max_position_embeddings``.
        key: a PRNG key.
        temperature: divides the logits; 0 takes the likeliest token.

    Returns:
        Token ids ``[B, P + length]``, the prompt included.

    Raises:
        ValueError: the prompt is empty, the window too long or the temperature negative.
    """
    P = prompt_tokens_BP.shape[1]
    window = model.config.max_position_embeddings
    if not 1 <= P <= P + length <= window:
        raise ValueError(
            f"the prompt (at least 1 token) and the continuation must fit {window} positions, got {P} + {length}."
        )
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}.")

    def next_token(tokens_BT, position):
        x_BTD = model.hidden(tokens_BT)
        logits_BV = model.logits(jax.lax.dynamic_index_in_dim(x_BTD, position - 1, axis=1, keepdims=False))
        token_B = _sample(jax.random.fold_in(key, position), logits_BV, temperature).astype(tokens_BT.dtype)
        return jax.lax.dynamic_update_index_in_dim(tokens_BT, token_B, position, axis=1), None

    tokens_BT = jnp.pad(prompt_tokens_BP, [(0, 0), (0, length)])
    return jax.lax.scan(next_token, tokens_BT, jnp.arange(P, P + length))[0]


def _sample(key: jax.Array, logits_BV: jax.Array, temperature: float) -> jax.Array:
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    return jax.random.categorical(key, logits_BV / temperature)
