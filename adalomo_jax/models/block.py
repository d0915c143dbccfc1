"""A layer of a decoder: norms, attention, and a gated MLP or a mixture of them, with the parts that the config says.

Letters in names of arrays: as in `decoder`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from adalomo_jax.models.attention import Kind, causal_attention
from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.mixture import Balance, Mixture
from adalomo_jax.models.parts import activation, linear, norm_of
from adalomo_jax.models.positions import Position
from adalomo_jax.models.rotary import rotate


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
        self.is_fused, self.act = config.fused_projections, activation(config)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        if self.is_fused:
            gate, up = jnp.split(self.gate_up_proj(x_BTD), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x_BTD), self.up_proj(x_BTD)
        return self.down_proj(self.act(gate) * up)


class Block(nnx.Module):
    """One layer: attention, then an MLP or a mixture, each added to the stream. Norms have Hugging Face's names.

    ``post_attention_layernorm`` is the norm before the MLP if norms come before, and else the norm of the attention's
    result.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype,
        kind: Kind = "blocks",
        sharding: NamedSharding | None = None,
    ):
        norm = lambda: norm_of(config, config.hidden_size, dtype=dtype)
        if config.norms != "after":
            self.input_layernorm = norm()
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype, kind=kind, sharding=sharding)
        self.post_attention_layernorm = norm()
        if config.norms == "around":
            self.pre_feedforward_layernorm = norm()
        if config.norms != "before":
            self.post_feedforward_layernorm = norm()
        self.mlp: Any = (
            MLP(config, rngs=rngs, dtype=dtype)
            if config.num_experts is None
            else Mixture(config, rngs=rngs, dtype=dtype, sharding=sharding)
        )
        self.norms, self.residual_scale = config.norms, config.residual_scale

    def __call__(
        self, x_BTD: jax.Array, at: Position, segments_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Balance | None]:
        """The stream after the layer, and how its router spread the tokens; None without one."""
        return self.add(x_BTD, self.self_attn(self.read(x_BTD), at, segments_BT), segments_BT)

    def read(self, x_BTD: jax.Array) -> jax.Array:
        """What the attention reads of the stream."""
        return x_BTD if self.norms == "after" else self.input_layernorm(x_BTD)

    def add(
        self, x_BTD: jax.Array, attended_BTD: jax.Array, segments_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Balance | None]:
        """Adds the attention's result to the stream, then what the MLP makes of the sum; returns what a call does."""
        if self.norms == "before":
            x_BTD = x_BTD + self._scaled(attended_BTD)
            out_BTD, balance = self._fed(self.post_attention_layernorm(x_BTD), segments_BT)
            return x_BTD + self._scaled(out_BTD), balance
        x_BTD = x_BTD + self._scaled(self.post_attention_layernorm(attended_BTD))
        read_BTD = x_BTD if self.norms == "after" else self.pre_feedforward_layernorm(x_BTD)
        out_BTD, balance = self._fed(read_BTD, segments_BT)
        return x_BTD + self._scaled(self.post_feedforward_layernorm(out_BTD)), balance

    def _fed(self, x_BTD: jax.Array, segments_BT: jax.Array | None) -> tuple[jax.Array, Balance | None]:
        if isinstance(self.mlp, MLP):
            return self.mlp(x_BTD), None
        return self.mlp(x_BTD, None if segments_BT is None else segments_BT != 0)

    def _scaled(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if self.residual_scale == 1 else self.residual_scale * x_BTD
