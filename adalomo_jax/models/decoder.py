"""A Llama-like decoder in Flax NNX, with its layers stacked on axis 0 and run by one scan.

Letters in names of arrays: B batch, T position, D residual stream, F SwiGLU, N query heads, K key and value heads,
H width of a head, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from adalomo_jax.models.attention import Kind, causal_attention
from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.rotary import rotary_angles, rotate
from adalomo_jax.optimizers.kept import floats

HeadAxes = Literal["dv", "vd"]
"""The axes of the head, or of the embedding if that is also the head."""

_INIT = nnx.initializers.normal(0.02)


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x**2) + eps) * weight``, computed in float32."""

    def __init__(self, size: int, *, eps: float, dtype):
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        weight = jnp.expand_dims(self.weight[...].astype(jnp.float32), range(x.ndim - 1))
        return (x * weight).astype(x_BTD.dtype)


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
        self.q_proj = _linear(D, N * H, rngs=rngs, dtype=dtype, bias=config.qkv_bias)
        self.k_proj = _linear(D, K * H, rngs=rngs, dtype=dtype, bias=config.qkv_bias)
        self.v_proj = _linear(D, K * H, rngs=rngs, dtype=dtype, bias=config.qkv_bias)
        self.o_proj = _linear(N * H, D, rngs=rngs, dtype=dtype, bias=config.o_bias)
        self.kind: Kind = kind
        self.head_dim, self.window, self.sharding = H, config.sliding_window, sharding

    def __call__(
        self, x_BTD: jax.Array, cos: jax.Array, sin: jax.Array, segments_BT: jax.Array | None = None
    ) -> jax.Array:
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, cos, sin)
        out_BTNH = causal_attention(
            q_BTNH, k_BTKH, v_BTKH, self.kind, segments_BT=segments_BT, window=self.window, sharding=self.sharding
        )
        return self.join(out_BTNH)

    def project(self, x_BTD: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries ``[B, T, N, H]``, keys and values ``[B, T, K, H]``, turned by the angles of their positions."""
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTNH = rotate(self.q_proj(x_BTD).reshape(heads), cos, sin)
        k_BTKH = rotate(self.k_proj(x_BTD).reshape(heads), cos, sin)
        return q_BTNH, k_BTKH, self.v_proj(x_BTD).reshape(heads)

    def join(self, out_BTNH: jax.Array) -> jax.Array:
        """Projects the heads' results back into the residual stream."""
        return self.o_proj(out_BTNH.reshape(*out_BTNH.shape[:2], -1))


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype):
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = _linear(D, F, rngs=rngs, dtype=dtype)
        self.up_proj = _linear(D, F, rngs=rngs, dtype=dtype)
        self.down_proj = _linear(F, D, rngs=rngs, dtype=dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nnx.Module):
    """One layer: attention, then SwiGLU, each on the normalized stream and added to it."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype, **attention):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype, **attention)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def __call__(
        self, x_BTD: jax.Array, cos: jax.Array, sin: jax.Array, segments_BT: jax.Array | None = None
    ) -> jax.Array:
        return self.add(x_BTD, self.self_attn(self.input_layernorm(x_BTD), cos, sin, segments_BT))

    def add(self, x_BTD: jax.Array, attended_BTD: jax.Array) -> jax.Array:
        """Adds the attention's result to the stream, then what SwiGLU makes of the sum."""
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


def _stacked_blocks(config: DecoderConfig, *, rngs: nnx.Rngs, **options) -> Block:
    """A ``Block`` whose leaves all have a leading layer axis. A loop, not a vmap: one layer's random bits at a time."""

    def block(key: jax.Array) -> Block:
        return Block(config, rngs=nnx.Rngs(key), **options)

    keys = jax.random.split(rngs.params(), config.num_hidden_layers)
    graphdef = nnx.graphdef(nnx.eval_shape(block, keys[0]))
    return nnx.merge(graphdef, jax.lax.map(lambda key: nnx.state(block(key)), keys))


class Decoder(nnx.Module):
    """A language model: a Llama, a Mistral or a Qwen2, depending on its config.

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
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
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
        cos, sin = rotary_angles(tokens_BT.shape[1], config.head_dim, config.rope_theta, config.rope_scaling)
        graphdef, layers = nnx.split(self.layers)

        def run_layer(x_BTD, layer):
            x_BTD = nnx.merge(graphdef, floats(layer))(x_BTD, cos, sin, segments_BT)
            return self._spread(x_BTD), None

        x_BTD = self._spread(self.embed_tokens(tokens_BT))
        x_BTD, _ = jax.lax.scan(_checkpoint(run_layer, self.remat), x_BTD, layers)
        return self.norm(x_BTD)

    def _spread(self, x_BTD: jax.Array) -> jax.Array:
        """The residual stream, spread so that each device has whole sequences."""
        sharding = self.batch_sharding
        return x_BTD if sharding is None else jax.lax.with_sharding_constraint(x_BTD, sharding)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Only the head: ``[..., D]`` to logits ``[..., V]``, accumulated in float32."""
        return project(x_BTD, *self.head())

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


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x_BTD: jax.Array, head: jax.Array, axes: HeadAxes = "dv") -> jax.Array:
    """``x @ head``, or ``x @ head.T`` if the axes say so, accumulated in float32 even if both are bfloat16.

    An embedding is not transposed first: if XLA multiplied by the transpose more than once, it would write it out.

    The cotangent is rounded to the type of ``x`` before it is multiplied. Otherwise the two products of the backward
    pass would be float32, at half the speed of a GPU or less.
    """
    return jnp.einsum(f"...d,{axes}->...v", x_BTD, head, preferred_element_type=jnp.float32)


def _project_forward(x_BTD, head, axes):
    return project(x_BTD, head, axes), (x_BTD, head)


def _project_backward(axes, saved, d_logits_BTV):
    x_BTD, head = saved
    d_logits_BTV = d_logits_BTV.astype(x_BTD.dtype)
    d_x_BTD = jnp.einsum(f"...v,{axes}->...d", d_logits_BTV, head)
    return d_x_BTD, jnp.einsum(f"...d,...v->{axes}", x_BTD, d_logits_BTV)


project.defvjp(_project_forward, _project_backward)


def _checkpoint(body: Callable, remat: bool | Callable[..., bool]) -> Callable:
    if remat is False:
        return body
    return jax.checkpoint(body, prevent_cse=False, policy=None if remat is True else remat)
