"""What a decoder's layers are made of: norms, linear maps, the gate's activation, and the initial weights.

Letters in names of arrays: as in `decoder`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from adalomo_jax.models.config import DecoderConfig

INIT = nnx.initializers.normal(0.02)
"""The initial weights of matrices and embeddings."""


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x**2) + eps) * (weight + offset)``, computed in float32. At first the factor is 1."""

    def __init__(self, size: int, *, eps: float, dtype, offset: float = 0.0):
        self.weight = nnx.Param(jnp.full((size,), 1 - offset, dtype))
        self.eps, self.offset = eps, offset

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        weight = jnp.expand_dims(self.weight[...].astype(jnp.float32), range(x.ndim - 1))
        return (x * (weight + self.offset if self.offset else weight)).astype(x_BTD.dtype)


def norm_of(config: DecoderConfig, size: int, *, dtype) -> RMSNorm:
    return RMSNorm(size, eps=config.rms_norm_eps, dtype=dtype, offset=config.norm_offset)


def linear(size_in: int, size_out: int, *, rngs: nnx.Rngs, dtype, bias: bool = False) -> nnx.Linear:
    return nnx.Linear(size_in, size_out, use_bias=bias, param_dtype=dtype, kernel_init=INIT, rngs=rngs)


def activation(config: DecoderConfig) -> Callable[[jax.Array], jax.Array]:
    """The activation of the gate of a gated MLP."""
    return jax.nn.silu if config.hidden_act == "silu" else partial(jax.nn.gelu, approximate=True)
