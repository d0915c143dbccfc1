"""Text from a model, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adalomo_jax.models.cache import Cache, cached_hidden, empty_cache
from adalomo_jax.models.decoder import Decoder


class Sampler(NamedTuple):
    """How a token is drawn from a model's logits. It holds Python numbers, so ``jit`` can take it as static."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draws from the fewest likeliest tokens that together have this probability; 1 draws from all."""
    eos: int | tuple[int, ...] | None = None
    """The token that ends a sequence, or several such tokens; the drawn one is repeated to the end."""


def generate(
    model: Decoder,
    prompt_tokens_BP: jax.Array,
    length: int,
    *,
    key: jax.Array,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos: int | tuple[int, ...] | None = None,
) -> jax.Array:
    """Continue each prompt by ``length`` sampled tokens.

    The prompt is read at once; then each token costs a forward pass over one position, which sees the others in a cache
    of keys and values. Under ``jit``, all arguments except ``model``, ``prompt_tokens_BP`` and ``key`` must be static.

    Args:
        model: the model.
        prompt_tokens_BP: token ids ``[B, P]``, ``P >= 1``.
        length: tokens to add; ``P + length`` may not exceed ``max_position_embeddings``.
        key: a PRNG key.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draws from the nucleus: the fewest likeliest tokens that together have this probability.
        eos: the token that ends a sequence, or several such tokens; all positions after the first one repeat it.

    Returns:
        Token ids ``[B, P + length]``, the prompt included.

    Raises:
        ValueError: the prompt is empty, prompt and continuation are too long for the model, the temperature is
            negative, or ``top_p`` is not above 0 and at most 1.

    Source: nucleus sampling: Holtzman et al. (2020), arXiv:1904.09751.
    """
    sampler = Sampler(temperature, top_p, eos)
    _check(model, prompt_tokens_BP.shape[1], length, sampler)
    if length == 0:
        return prompt_tokens_BP

    def advance(decoding, _):
        decoding = _advance(model, decoding, key, sampler)
        return decoding, decoding.token_B

    first = _begin(model, prompt_tokens_BP, length, key, sampler)
    _, tokens_TB = jax.lax.scan(advance, first, length=length - 1)
    return jnp.concatenate([prompt_tokens_BP, first.token_B[:, None], tokens_TB.T], axis=1)


def stream(
    model: Decoder, prompt_tokens_BP: jax.Array, length: int, *, key: jax.Array, sampler: Sampler
) -> Iterator[np.ndarray]:
    """Yields the tokens ``[B]`` that `generate` adds, each as soon as it is drawn, until all sequences have ended.

    It compiles two programs by itself: do not call it under ``jit``. Args and errors are those of `generate`.
    """
    _check(model, prompt_tokens_BP.shape[1], length, sampler)
    begin = jax.jit(_begin, static_argnames=("length", "sampler"))
    advance = jax.jit(_advance, static_argnames="sampler", donate_argnums=1)
    decoding = None
    for _ in range(length):
        if decoding is None:
            decoding = begin(model, prompt_tokens_BP, length, key, sampler)
        else:
            decoding = advance(model, decoding, key, sampler)
        yield np.array(decoding.token_B)
        if np.all(decoding.ended_B):
            return


def nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """The logits of the fewest likeliest tokens that together have the probability ``top_p``; the others are -inf.

    >>> nucleus(jnp.log(jnp.array([[0.2, 0.5, 0.3]])), 0.6).tolist()[0][0]
    -inf
    """
    order_BV = jnp.argsort(logits_BV, axis=-1, descending=True)
    sorted_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    is_kept_BV = jnp.put_along_axis(
        jnp.zeros(logits_BV.shape, bool), order_BV, before_BV < top_p, axis=-1, inplace=False
    )
    return jnp.where(is_kept_BV, logits_BV, -jnp.inf)


class _Decoding(NamedTuple):
    """The state of the generation: the last token is drawn, but not yet read."""

    cache: Cache
    token_B: jax.Array
    ended_B: jax.Array


def _begin(model: Decoder, prompt_tokens_BP: jax.Array, length: int, key: jax.Array, sampler: Sampler) -> _Decoding:
    """The state after the prompt, with room for ``length`` more tokens."""
    B, P = prompt_tokens_BP.shape
    x_BPD, cache = cached_hidden(model, prompt_tokens_BP, empty_cache(model, B, P + length))
    token_B = _draw(model, x_BPD, cache, key, sampler).astype(prompt_tokens_BP.dtype)
    return _Decoding(cache, token_B, _ends(token_B, sampler))


def _advance(model: Decoder, decoding: _Decoding, key: jax.Array, sampler: Sampler) -> _Decoding:
    """The state one token later."""
    x_B1D, cache = cached_hidden(model, decoding.token_B[:, None], decoding.cache)
    token_B = _draw(model, x_B1D, cache, key, sampler).astype(decoding.token_B.dtype)
    token_B = jnp.where(decoding.ended_B, decoding.token_B, token_B)
    return _Decoding(cache, token_B, decoding.ended_B | _ends(token_B, sampler))


def _draw(model: Decoder, x_BSD: jax.Array, cache: Cache, key: jax.Array, sampler: Sampler) -> jax.Array:
    """The token after those read. Its position decides its key, so it is the same however it was reached."""
    return _sample(jax.random.fold_in(key, cache.length), model.logits(x_BSD[:, -1]), sampler)


def _ends(token_B: jax.Array, sampler: Sampler) -> jax.Array:
    eos = () if sampler.eos is None else sampler.eos if isinstance(sampler.eos, tuple) else (sampler.eos,)
    return jnp.isin(token_B, jnp.array(eos, token_B.dtype))


def _sample(key: jax.Array, logits_BV: jax.Array, sampler: Sampler) -> jax.Array:
    if sampler.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV / sampler.temperature
    return jax.random.categorical(key, logits_BV if sampler.top_p == 1 else nucleus(logits_BV, sampler.top_p))


def _check(model: Decoder, P: int, length: int, sampler: Sampler) -> None:
    window = model.config.max_position_embeddings
    if not 1 <= P <= P + length <= window:
        raise ValueError(
            f"the prompt (at least 1 token) and the continuation must fit {window} positions, got {P} + {length}."
        )
    if not sampler.temperature >= 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {sampler.temperature}.")
    if not 0 < sampler.top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (all tokens), got {sampler.top_p}.")
