"""Rotary positions: each pair of coordinates is turned by an angle that grows with the position.

Letters in names of arrays: B batch, T position, N heads, H width of a head.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from adalomo_jax.models.config import RopeScaling


def rotary_frequencies(
    rotary_dim: int, theta: float, scaling: RopeScaling | None = None, *, positions: int = 0
) -> jax.Array:
    """``theta**(-2 i / H)``, scaled: ``[H / 2]``, float32, in radians a position.

    Args:
      rotary_dim: the number of coordinates that are turned, ``H``.
      theta: the base.
      scaling: how the frequencies are scaled.
      positions: the length of the whole sequence, which decides between ``longrope``'s factors.

    Source: `linear`: Chen et al. (2023), arXiv:2306.15595; `llama3`: the Llama 3.1 reference code, like Hugging Face's;
    `longrope`: Ding et al. (2024), arXiv:2402.13753.
    """
    frequencies = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    return frequencies if scaling is None else frequencies / frequency_divisors(frequencies, scaling, positions)


def frequency_divisors(frequencies: jax.Array, scaling: RopeScaling, positions: int = 0) -> jax.Array:
    """The divisor of each frequency, for sequences of this many positions."""
    if scaling.rope_type == "linear":
        return jnp.full_like(frequencies, scaling.factor)
    if scaling.rope_type == "longrope":
        is_long = positions > scaling.original_max_position_embeddings
        return jnp.asarray(scaling.long_factor if is_long else scaling.short_factor, jnp.float32)
    # Short waves stay, long ones are stretched by the factor, and the frequency changes linearly between the two.
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    waves = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    short = jnp.clip((waves - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - short) / scaling.factor + short)


def rotary_angles(
    length: int,
    rotary_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    *,
    first: int | jax.Array = 0,
    positions: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines ``[T, H / 2]`` (float32) of position times frequency.

    Args:
      length: the number of positions, ``T``.
      rotary_dim, theta, scaling: as in `rotary_frequencies`.
      first: the first position.
      positions: the length of the whole sequence that the positions are a part of; None if they are all of it.
    """
    frequencies = rotary_frequencies(rotary_dim, theta, scaling, positions=positions or length)
    angles = (first + jnp.arange(length)).astype(jnp.float32)[:, None] * frequencies[None]
    factor = 1.0 if scaling is None else scaling.attention_factor
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pair ``(x[i], x[i + H/2])`` by its position's angle (Hugging Face's pairing of the coordinates).

    If there are fewer angles than pairs, the coordinates after the first ``H`` stay as they are.
    """
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim < x_BTNH.shape[-1]:
        turned, rest = rotate(x_BTNH[..., :rotary_dim], cos, sin), x_BTNH[..., rotary_dim:]
        return jnp.concatenate([turned, rest], axis=-1)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
