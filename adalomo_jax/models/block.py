"""A layer of a decoder: RMSNorm, attention and a gated MLP, with the parts that the config says.

Letters in names of arrays: as in `decoder`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from adalomo_jax.models.attention import Kind, causal_attention
from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.positions import Position
from adalomo_jax.models.rotary import rotate

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


class Attention(nnx.Module):
    """Causal attention with rotary positions and grouped queries."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype,
        kind: Kind = "blocks",
        sharding: NamedSharding | None = None,
    ):
        D, H = config.hidden_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        into = lambda size: linear(D, size, rngs=rngs, dtype=dtype, bias=config.qkv_bias)
        if config.fused_projections:
            self.qkv_proj = into((N + 2 * K) * H)
        else:
            self.q_proj, self.k_proj, self.v_proj = into(N * H), into(K * H), into(K * H)
        self.o_proj = linear(N * H, D, rngs=rngs, dtype=dtype, bias=config.o_bias)
        if config.qk_norm is not None:
            heads = (1, 1) if config.qk_norm == "head" else (N, K)
            self.q_norm, self.k_norm = (norm_of(config, n * H, dtype=dtype) for n in heads)
        self.kind: Kind = kind
        self.config, self.sharding = config, sharding

    def __call__(self, x_BTD: jax.Array, at: Position, segments_BT: jax.Array | None = None) -> jax.Array:
        config = self.config
        out_BTNH = causal_attention(
            *self.project(x_BTD, at),
            self.kind,
            segments_BT=segments_BT,
            window=config.sliding_window,
            is_windowed=at.is_windowed,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            sharding=self.sharding,
        )
        return self.join(out_BTNH)

    def project(self, x_BTD: jax.Array, at: Position) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries ``[B, T, N, H]``, keys and values ``[B, T, K, H]``, turned by the angles of their positions."""
        config, heads = self.config, (*x_BTD.shape[:2], -1, self.config.head_dim)
        N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if config.fused_projections:
            q, k, v = jnp.split(self.qkv_proj(x_BTD), [N * H, (N + K) * H], axis=-1)
        else:
            q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if config.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BTNH, k_BTKH, v_BTKH = (x.reshape(heads) for x in (q, k, v))
        if config.qk_norm == "head":
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        return rotate(q_BTNH, at.cos, at.sin), rotate(k_BTKH, at.cos, at.sin), v_BTKH

    def join(self, out_BTNH: jax.Array) -> jax.Array:
        """Projects the heads' results back into the residual stream."""
        return self.o_proj(out_BTNH.reshape(*out_BTNH.shape[:2], -1))


class MLP(nnx.Module):
    """A gated MLP: ``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype):
        D, F = config.hidden_size, config.intermediate_size
        of = lambda size_in, size_out: linear(size_in, size_out, rngs=rngs, dtype=dtype, bias=config.mlp_bias)
        if config.fused_projections:
            self.gate_up_proj = of(D, 2 * F)
        else:
            self.gate_proj, self.up_proj = of(D, F), of(D, F)
        self.down_proj = of(F, D)
        self.is_fused, self.act = config.fused_projections, config.hidden_act

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        if self.is_fused:
            gate, up = jnp.split(self.gate_up_proj(x_BTD), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x_BTD), self.up_proj(x_BTD)
        gate = jax.nn.silu(gate) if self.act == "silu" else jax.nn.gelu(gate, approximate=True)
        return self.down_proj(gate * up)


class Block(nnx.Module):
    """One layer: attention, then an MLP, each added to the stream. Norms have Hugging Face's names.

    ``post_attention_layernorm`` is the norm before the MLP if norms come before, and else the norm of the attention's
    result.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype, **attention):
        norm = lambda: norm_of(config, config.hidden_size, dtype=dtype)
        if config.norms != "after":
            self.input_layernorm = norm()
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype, **attention)
        self.post_attention_layernorm = norm()
        if config.norms == "around":
            self.pre_feedforward_layernorm = norm()
        if config.norms != "before":
            self.post_feedforward_layernorm = norm()
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)
        self.norms, self.residual_scale = config.norms, config.residual_scale

    def __call__(self, x_BTD: jax.Array, at: Position, segments_BT: jax.Array | None = None) -> jax.Array:
        return self.add(x_BTD, self.self_attn(self.read(x_BTD), at, segments_BT))

    def read(self, x_BTD: jax.Array) -> jax.Array:
        """What the attention reads of the stream."""
        return x_BTD if self.norms == "after" else self.input_layernorm(x_BTD)

    def add(self, x_BTD: jax.Array, attended_BTD: jax.Array) -> jax.Array:
        """Adds the attention's result to the stream, then what the MLP makes of the sum."""
        if self.norms == "before":
            x_BTD = x_BTD + self._scaled(attended_BTD)
            return x_BTD + self._scaled(self.mlp(self.post_attention_layernorm(x_BTD)))
        x_BTD = x_BTD + self._scaled(self.post_attention_layernorm(attended_BTD))
        read_BTD = x_BTD if self.norms == "after" else self.pre_feedforward_layernorm(x_BTD)
        return x_BTD + self._scaled(self.post_feedforward_layernorm(self.mlp(read_BTD)))

    def _scaled(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if self.residual_scale == 1 else self.residual_scale * x_BTD
