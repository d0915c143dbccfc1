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

from adalomo_jax.models.attention import Kind
from adalomo_jax.models.block import Block
from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.head_loss import Head, HeadAxes
from adalomo_jax.models.mixture import Balance
from adalomo_jax.models.parts import INIT, linear, norm_of
from adalomo_jax.models.positions import Positions
from adalomo_jax.optimizers.kept import floats


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
            config.vocab_size, config.hidden_size, param_dtype=dtype, embedding_init=INIT, rngs=rngs
        )
        self.layers = _stacked_blocks(config, rngs=rngs, dtype=dtype, kind=attention, sharding=batch_sharding)
        self.norm = norm_of(config, config.hidden_size, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size, rngs=rngs, dtype=dtype)

    def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
        """Logits ``[B, T, V]`` (float32) of the token after each position; see `hidden`."""
        return self.logits(self.hidden(tokens_BT, segments_BT))

    def hidden(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
        """The residual stream ``[B, T, D]`` after all layers and the last norm.

        Positions of different ``segments_BT`` (integers, such as one for each document packed into a sequence) do not
        see each other. Rotary positions need not restart, because attention depends only on their differences.
        """
        return self.run(tokens_BT, segments_BT)[0]

    def run(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None) -> tuple[jax.Array, Balance | None]:
        """`hidden`, and how the layers' routers spread the tokens of segments other than 0; None without experts."""
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
            block: Block = nnx.merge(graphdef, floats(layer))
            x_BTD, balance = block(x_BTD, positions.of_layer(traits), segments_BT)
            return self._spread(x_BTD), balance

        x_BTD = self._spread(self.embed(tokens_BT))
        x_BTD, balance = jax.lax.scan(_checkpoint(run_layer, self.remat), x_BTD, (layers, positions.traits))
        return self.norm(x_BTD), balance

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
