"""Next-token cross-entropy that never holds the logits of a whole sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from adalomo_jax.models.decoder import Decoder
from adalomo_jax.models.head_loss import Head, head_loss
from adalomo_jax.models.mixture import balancing_loss
from adalomo_jax.models.sharding import gather, out_of_stream


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
    router_loss: float = 0.0,
    chunk_size: int = 256,
) -> jax.Array:
    """Mean of ``-log(softmax(model(tokens)[:, :-1]))[tokens[:, 1:]]`` over the targets that the mask keeps.

    Tiles of the vocabulary pass through the head one after the other (`head_loss`). So only as many logits, in float32,
    exist at a time as ``chunk_size`` positions have, forward and backward.

    Args:
        model: the model.
        tokens_BT: token ids ``[B, T]``, integers.
        mask_BT: ``[B, T]``; where it is false (or 0) the token is read but not predicted. ``mask_BT[:, 0]`` has no
            effect: nothing predicts the first token. ``None`` predicts all others.
        segments_BT: ``[B, T]``, integers: positions of different segments do not see and do not predict each other.
        count: the divisor of the sum, in place of the number of targets. For a part of a batch, pass the
            `count_targets` of the whole, so that the parts' losses add up to the batch's mean.
        router_loss: the factor of `balancing_loss`, which is added for a mixture of experts. A part of a batch adds its
            own, times its share of the targets.
        chunk_size: as many logits exist at once as this number of positions has.

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
    x_BTD, balance = model.run(tokens_BT, segments_BT)
    targets_BT = jnp.roll(tokens_BT, -1, axis=1)
    weights_BT = _target_weights(jnp.ones((B, T)) if mask_BT is None else mask_BT, segments_BT)
    total = _total(model, chunk_size, x_BTD, targets_BT, weights_BT)
    own_count = jnp.maximum(jnp.sum(weights_BT), 1.0)
    if balance is not None and router_loss:
        total += router_loss * own_count * balancing_loss(balance)
    return total / (own_count if count is None else count)


def _target_weights(mask_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """``[B, T]``, float32: whether each position predicts the token after it."""
    weights_BT = jnp.roll(mask_BT, -1, axis=1).astype(jnp.float32)
    if segments_BT is not None:
        weights_BT *= (segments_BT == jnp.roll(segments_BT, -1, axis=1)).astype(jnp.float32)
    return weights_BT.at[:, -1].set(0.0)


def _total(
    model: Decoder, chunk_size: int, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """The weighted sum of the loss.

    On a mesh each device loops over its own part of the vocabulary, for its own sequences. With FSDP it gathers the
    head once. Otherwise XLA would gather parts that it has to cut again, or sum the head's whole gradient everywhere.
    """
    head, axes = model.head()
    how = Head(axes, model.config.logits_divisor, model.config.logits_softcap)
    width = lambda vocabulary: -(-vocabulary * chunk_size // x_BTD.shape[1])
    of_batch = model.batch_sharding
    head_DV = head if axes == "dv" else head.T
    rows, columns = (None, None) if of_batch is None else _axes_of_more_than_one(head_DV.shape, of_batch.mesh)
    if of_batch is None or (rows is None and columns is None):
        return head_loss(x_BTD, head, targets_BT, weights_BT, how._replace(width=width(model.config.vocab_size)))
    of_sequences = PartitionSpec(of_batch.spec[0])
    summed = (*_names(of_sequences[0]), *_names(columns))

    def of_part(x_BTD, targets_BT, weights_BT, head_DV):
        head_DV = head_DV if rows is None else jnp.asarray(gather(head_DV, 0, rows))
        here = how._replace(axes="dv", width=width(head_DV.shape[1]), over=columns)
        return jax.lax.psum(head_loss(x_BTD, head_DV, targets_BT, weights_BT, here), summed)

    # Over all axes of the mesh: over some of them, XLA's CPU compiler aborts at bfloat16 (jaxlib 0.10.2, 0.12.0).
    on_parts = jax.shard_map(
        of_part,
        mesh=of_batch.mesh,
        in_specs=(of_sequences, of_sequences, of_sequences, PartitionSpec(rows, columns)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return on_parts(x_BTD, targets_BT, weights_BT, head_DV)


def _axes_of_more_than_one(shape_DV: tuple[int, ...], mesh: Mesh | AbstractMesh) -> list[str | None]:
    """For each axis of the head the mesh's axis that cuts it, if any does."""
    return [name if name is not None and mesh.shape[name] > 1 else None for name in out_of_stream(shape_DV, mesh).spec]


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of a mesh that an entry of a ``PartitionSpec`` names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
