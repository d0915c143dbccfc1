"""Rotary positions: each pair of coordinates is turned by an angle that grows with the position.

Letters in names of arrays: B batch, T position, N heads, H width of a head.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from adalomo_jax.models.config import RopeScaling


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
    """``theta**(-2 i / H)``, scaled: ``[H / 2]``, float32, in radians a position.

    Source: `linear`: Chen et al. (2023), arXiv:2306.15595; `llama3`: the Llama 3.1 reference code, like Hugging Face's.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return frequencies if scaling is None else frequencies / frequency_divisors(frequencies, scaling)


def frequency_divisors(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
    """The divisor of each frequency, at least 1."""
    if scaling.rope_type == "linear":
        return jnp.full_like(frequencies, scaling.factor)
    # Short waves stay, long ones are stretched by the factor, and the frequency changes linearly between the two.
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    waves = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    short = jnp.clip((waves - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - short) / scaling.factor + short)


def rotary_angles(
    length: int, head_dim: int, theta: float, scaling: RopeScaling | None = None, *, first: int | jax.Array = 0
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines ``[T, H / 2]`` (float32) of position times frequency; ``first`` is the first position."""
    frequencies = rotary_frequencies(head_dim, theta, scaling)
    angles = (first + jnp.arange(length)).astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pair ``(x[i], x[i + H/2])`` by its position's angle (Hugging Face's pairing of the coordinates)."""
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
