"""A Llama-like decoder in Flax NNX, with its layers stacked on axis 0 and run by one scan.

Letters in names of arrays: B batch, T position, D residual stream, F gated MLP, N query heads, K key and value heads,
H width of a head, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from adalomo_jax.models.attention import Kind, causal_attention
from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.head_loss import Head, HeadAxes
from adalomo_jax.models.positions import Position, Positions
from adalomo_jax.models.rotary import rotate
from adalomo_jax.optimizers.kept import floats

_INIT = nnx.initializers.normal(0.02)


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


def _norm(config: DecoderConfig, size: int, *, dtype) -> RMSNorm:
    return RMSNorm(size, eps=config.rms_norm_eps, dtype=dtype, offset=config.norm_offset)


def _linear(size_in: int, size_out: int, *, rngs: nnx.Rngs, dtype, bias: bool = False) -> nnx.Linear:
    return nnx.Linear(size_in, size_out, use_bias=bias, param_dtype=dtype, kernel_init=_INIT, rngs=rngs)


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
        into = lambda size: _linear(D, size, rngs=rngs, dtype=dtype, bias=config.qkv_bias)
        if config.fused_projections:
            self.qkv_proj = into((N + 2 * K) * H)
        else:
            self.q_proj, self.k_proj, self.v_proj = into(N * H), into(K * H), into(K * H)
        self.o_proj = _linear(N * H, D, rngs=rngs, dtype=dtype, bias=config.o_bias)
        if config.qk_norm is not None:
            heads = (1, 1) if config.qk_norm == "head" else (N, K)
            self.q_norm, self.k_norm = (_norm(config, n * H, dtype=dtype) for n in heads)
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
        linear = lambda size_in, size_out: _linear(size_in, size_out, rngs=rngs, dtype=dtype, bias=config.mlp_bias)
        if config.fused_projections:
            self.gate_up_proj = linear(D, 2 * F)
        else:
            self.gate_proj, self.up_proj = linear(D, F), linear(D, F)
        self.down_proj = linear(F, D)
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
        norm = lambda: _norm(config, config.hidden_size, dtype=dtype)
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


def _stacked_blocks(config: DecoderConfig, *, rngs: nnx.Rngs, **options) -> Block:
    """A ``Block`` whose leaves all have a leading layer axis. A loop, not a vmap: one layer's random bits at a time."""

    def block(key: jax.Array) -> Block:
        return Block(config, rngs=nnx.Rngs(key), **options)

    keys = jax.random.split(rngs.params(), config.num_hidden_layers)
    graphdef = nnx.graphdef(nnx.eval_shape(block, keys[0]))
    return nnx.merge(graphdef, jax.lax.map(lambda key: nnx.state(block(key)), keys))


class Decoder(nnx.Module):
    """A language model: a Llama, or a model of another of `adalomo_jax.models.families`, depending on its config.

    ``model.layers`` is one ``Block`` whose leaves are stacked on axis 0. One ``jax.lax.scan`` takes them as its ``xs``,
    untransformed, so ``adalomo_jax.fuse`` updates them layer by layer.

    Args:
        config: the sizes.
        rngs: the key of the initial weights (normal, standard deviation 0.02; norms start at 1).
        dtype: the type of the weights and activations. Norms, softmax and logits are float32 regardless.
        remat: ``True`` saves only each layer's input and recomputes the layer in the backward pass, ``False`` saves all
            residuals; a policy of ``jax.checkpoint_policies`` chooses.
        attention: see :func:`~adalomo_jax.models.attention.causal_attention`.
        batch_sharding: the sharding of a batch that is spread over a mesh (:mod:`adalomo_jax.models.sharding`); each
            layer's input keeps it.

    Example:
        >>> from flax import nnx
        >>> from adalomo_jax.models import PRESETS
        >>> model = Decoder(PRESETS["tiny"], rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((2, 16), jnp.int32)).shape
        (2, 16, 256)

    Source: Touvron et al., LLaMA (2023), arXiv:2302.13971; grouped queries: Llama 2, arXiv:2307.09288.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        remat: bool | Callable[..., bool] = True,
        attention: Kind = "blocks",
        batch_sharding: NamedSharding | None = None,
    ):
        self.config, self.remat, self.batch_sharding = config, remat, batch_sharding
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, param_dtype=dtype, embedding_init=_INIT, rngs=rngs
        )
        self.layers = _stacked_blocks(config, rngs=rngs, dtype=dtype, kind=attention, sharding=batch_sharding)
        self.norm = _norm(config, config.hidden_size, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = _linear(config.hidden_size, config.vocab_size, rngs=rngs, dtype=dtype)

    def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
        """Logits ``[B, T, V]`` (float32) of the token after each position; see `hidden`."""
        return self.logits(self.hidden(tokens_BT, segments_BT))

    def hidden(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
        """The residual stream ``[B, T, D]`` after all layers and the last norm.

        Positions of different ``segments_BT`` (integers, such as one for each document packed into a sequence) do not
        see each other. Rotary positions need not restart, because attention depends only on their differences.
        """
        config = self.config
        if tokens_BT.shape[1] > config.max_position_embeddings:
            raise ValueError(
                f"a sequence has at most max_position_embeddings={config.max_position_embeddings} tokens, "
                f"got {tokens_BT.shape[1]}. Shorten it or raise max_position_embeddings."
            )
        positions = Positions(config, tokens_BT.shape[1])
        graphdef, layers = nnx.split(self.layers)

        def run_layer(x_BTD, layer_and_traits):
            layer, traits = layer_and_traits
            x_BTD = nnx.merge(graphdef, floats(layer))(x_BTD, positions.of_layer(traits), segments_BT)
            return self._spread(x_BTD), None

        x_BTD = self._spread(self.embed(tokens_BT))
        x_BTD, _ = jax.lax.scan(_checkpoint(run_layer, self.remat), x_BTD, (layers, positions.traits))
        return self.norm(x_BTD)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """The tokens' embeddings ``[B, T, D]``, scaled as the config says."""
        x_BTD, scale = self.embed_tokens(tokens_BT), self.config.embedding_scale
        return x_BTD if scale == 1 else x_BTD * jnp.asarray(scale, x_BTD.dtype)

    def _spread(self, x_BTD: jax.Array) -> jax.Array:
        """The residual stream, spread so that each device has whole sequences."""
        sharding = self.batch_sharding
        return x_BTD if sharding is None else jax.lax.with_sharding_constraint(x_BTD, sharding)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Only the head: ``[..., D]`` to logits ``[..., V]``, accumulated in float32."""
        head, axes = self.head()
        products = jnp.einsum(f"...d,{axes}->...v", x_BTD, head, preferred_element_type=jnp.float32)
        return Head(axes, self.config.logits_divisor, self.config.logits_softcap).logits(products)

    def head(self) -> tuple[jax.Array, HeadAxes]:
        """The head's matrix, or the embedding, untransposed, and the names of its axes."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.embedding[...], "vd"
        return self.lm_head.kernel[...], "dv"


def decoder_of(config: DecoderConfig, params: Any) -> Decoder:
    """The model with these parameters, a nested dictionary of arrays; ``nnx.state`` of the model gives them back.

    Weights in another form stay in it: the model decodes each layer where it runs it.

    Example:
        >>> from adalomo_jax.models import PRESETS
        >>> model = Decoder(PRESETS["tiny"], rngs=nnx.Rngs(0))
        >>> params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        >>> tokens = jnp.arange(8)[None]
        >>> bool(jnp.all(decoder_of(PRESETS["tiny"], params)(tokens) == model(tokens)))
        True
    """
    dtype = params["embed_tokens"]["embedding"].dtype
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))), params)


def _checkpoint(body: Callable, remat: bool | Callable[..., bool]) -> Callable:
    if remat is False:
        return body
    return jax.checkpoint(body, prevent_cse=False, policy=None if remat is True else remat)
