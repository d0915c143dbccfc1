"""Next-token cross-entropy that never holds the logits of a whole sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.decoder import Decoder, HeadAxes, finished_logits, project
from adalomo_jax.models.sharding import gather_rows, out_of_stream


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """``-log softmax(logits)[target]`` in nats, ``[B, T]``."""
    # A sum over a comparison, not a gather: XLA fuses its gradient into the softmax's; a scatter takes another buffer.
    tokens_V = jnp.arange(logits_BTV.shape[-1])
    is_target_BTV = jnp.expand_dims(tokens_V, range(targets_BT.ndim)) == targets_BT[..., None]
    picked_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT


def count_targets(mask_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
    """How many tokens `next_token_loss` takes the mean over, float32; at least 1."""
    return jnp.maximum(jnp.sum(_target_weights(mask_BT, segments_BT)), 1.0)


def next_token_loss(
    model: Decoder,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    *,
    count: jax.Array | None = None,
    chunk_size: int = 256,
) -> jax.Array:
    """Mean of ``cross_entropy(model(tokens)[:, :-1], tokens[:, 1:])`` over the targets that the mask keeps.

    Chunks of the sequence pass through the head one after the other, under ``jax.checkpoint``. So only one chunk of
    logits, ``[B, chunk_size, V]`` in float32, exists at a time, forward and backward.

    Args:
        model: the model.
        tokens_BT: token ids ``[B, T]``, integers.
        mask_BT: ``[B, T]``; where it is false (or 0) the token is read but not predicted. ``mask_BT[:, 0]`` has no
            effect: nothing predicts the first token. ``None`` predicts all others.
        segments_BT: ``[B, T]``, integers: positions of different segments do not see and do not predict each other.
        count: the divisor of the sum, in place of the number of targets. For a part of a batch, pass the
            `count_targets` of the whole, so that the parts' losses add up to the batch's mean.
        chunk_size: the number of positions whose logits exist at once. It need not divide ``T``.

    Returns:
        The mean loss in nats a token, float32; 0 when the mask keeps no target.

    Raises:
        ValueError: a sequence has fewer than 2 tokens, or ``chunk_size`` is below 1.

    Example:
        >>> from flax import nnx
        >>> from adalomo_jax.models import PRESETS
        >>> model = Decoder(PRESETS["tiny"], rngs=nnx.Rngs(0))
        >>> print(f"{next_token_loss(model, jnp.arange(64)[None]):.0f}")  # at random log(256) = 5.5, and rounded 6
        6
    """
    B, T = tokens_BT.shape
    if T < 2:
        raise ValueError(f"a sequence needs at least 2 tokens to have a next one, got {T}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 position, got {chunk_size}.")
    chunk_size = min(chunk_size, T)
    x_BTD = model.hidden(tokens_BT, segments_BT)
    targets_BT = jnp.roll(tokens_BT, -1, axis=1)
    weights_BT = _target_weights(jnp.ones((B, T)) if mask_BT is None else mask_BT, segments_BT)
    total = _total(model, chunk_size, x_BTD, targets_BT, weights_BT)
    return total / (jnp.maximum(jnp.sum(weights_BT), 1.0) if count is None else count)


def _target_weights(mask_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """``[B, T]``, float32: whether each position predicts the token after it."""
    weights_BT = jnp.roll(mask_BT, -1, axis=1).astype(jnp.float32)
    if segments_BT is not None:
        weights_BT *= (segments_BT == jnp.roll(segments_BT, -1, axis=1)).astype(jnp.float32)
    return weights_BT.at[:, -1].set(0.0)


def _total(
    model: Decoder, chunk_size: int, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """The weighted sum of the loss. With FSDP only, each device gathers the head once and sums over its sequences.

    Otherwise XLA would sum the whole gradient of the head on each device.
    """
    head, axes = model.head()
    head_DV = head if axes == "dv" else head.T
    mesh = None if model.batch_sharding is None else model.batch_sharding.mesh
    if mesh is None or not _is_gathered(head_DV, mesh):
        return _sum_of_chunks(model.config, chunk_size, x_BTD, targets_BT, weights_BT, head, axes)

    def of_part(x_BTD, targets_BT, weights_BT, head_DV):
        head_DV = jnp.asarray(gather_rows(head_DV, "fsdp"))
        return jax.lax.psum(_sum_of_chunks(model.config, chunk_size, x_BTD, targets_BT, weights_BT, head_DV), "fsdp")

    of_parts, everywhere = PartitionSpec("fsdp"), PartitionSpec()
    on_parts = jax.shard_map(
        of_part, mesh=mesh, in_specs=(of_parts,) * 4, out_specs=everywhere, axis_names={"fsdp"}, check_vma=False
    )
    return on_parts(x_BTD, targets_BT, weights_BT, head_DV)


def _is_gathered(head_DV: jax.Array, mesh: Mesh | AbstractMesh) -> bool:
    """Whether only FSDP cuts the head: a head that ``tensor`` cuts would be whole on each device in ``shard_map``."""
    return (
        mesh.shape["fsdp"] > 1 and mesh.shape["tensor"] == 1 and out_of_stream(head_DV.shape, mesh).spec[0] is not None
    )


def _sum_of_chunks(
    config: DecoderConfig,
    chunk_size: int,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    head: jax.Array,
    axes: HeadAxes = "dv",
) -> jax.Array:
    @jax.checkpoint
    def chunk_loss(total, chunk):
        x_BCD, targets_BC, weights_BC = chunk
        logits_BCV = finished_logits(config, project(x_BCD, head, axes))
        return total + jnp.sum(cross_entropy(logits_BCV, targets_BC) * weights_BC), None

    chunks = tuple(_chunked(a, chunk_size) for a in (x_BTD, targets_BT, weights_BT))
    return jax.lax.scan(chunk_loss, jnp.zeros((), jnp.float32), chunks)[0]


def _chunked(x_BT: jax.Array, chunk_size: int) -> jax.Array:
    """``[B, T, ...]`` to ``[chunks, B, chunk_size, ...]``, the end padded with zeros."""
    B, T = x_BT.shape[:2]
    padding = [(0, 0), (0, -T % chunk_size)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, padding).reshape(B, -1, chunk_size, *x_BT.shape[2:]).swapaxes(0, 1)
