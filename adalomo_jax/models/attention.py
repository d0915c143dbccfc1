"""Causal attention in the memory of a few rows of scores, by what a backend has for it.

Letters in names of arrays: B batch, T position, N query heads, K key and value heads, H width of a head.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Kind = Literal["blocks", "splash", "cudnn"]

BLOCK = 512
"""Queries whose scores exist at once, in blocks of plain XLA operations."""


def causal_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    kind: Kind = "blocks",
    *,
    sharding: NamedSharding | None = None,
    interpret: bool = False,
) -> jax.Array:
    """``softmax(q k^T / sqrt(H)) v`` over the positions up to each query's own; heads of queries share ``N / K``-wise.

    Args:
      q_BTNH: queries.
      k_BTKH: keys.
      v_BTKH: values.
      kind: ``"blocks"`` runs anywhere: block by block of 512 queries, whose scores are recomputed on the way back.
        ``"splash"`` is JAX's kernel for TPUs, ``"cudnn"`` NVIDIA's for GPUs.
      sharding: of the batch, where it is spread over a mesh; heads are over its axis ``tensor``. A kernel runs on each
        device's part; XLA spreads the blocks by itself.
      interpret: run the TPU's kernel in the interpreter, slowly, on any backend.

    Returns:
      ``[B, T, N, H]``, in the dtype of the queries.

    Raises:
      ValueError: for a kernel that does not take such heads or so many positions; see `splash_takes`.
    """
    if kind == "blocks":
        return _in_blocks(q_BTNH, k_BTKH, v_BTKH)
    if kind == "cudnn":
        kernel = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    else:
        T, H = q_BTNH.shape[1], q_BTNH.shape[-1]
        if not splash_takes(T, H):
            raise ValueError(
                f"attention='splash' takes a multiple of 128 positions and heads 128 wide, got {T} positions and heads "
                f"{H} wide. Take attention='blocks'."
            )
        kernel = lambda q, k, v: _splash(q, k, v, interpret)
    if sharding is None or sharding.mesh.size == 1:
        return kernel(q_BTNH, k_BTKH, v_BTKH)
    spec = PartitionSpec(*sharding.spec, None, "tensor")
    on_parts = jax.shard_map(kernel, mesh=sharding.mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return on_parts(q_BTNH, k_BTKH, v_BTKH)


def kind_for(platform: str, length: int, head_dim: int, dtype: Any) -> Kind:
    """What suits a platform (``"tpu"``, ``"gpu"``, ``"cuda"`` or ``"cpu"``) best: its own kernel where that can be had.

    cuDNN is looked for in this process, so a program that is compiled for a GPU elsewhere has blocks.
    """
    if platform == "tpu" and splash_takes(length, head_dim):
        return "splash"
    if platform in ("gpu", "cuda") and jax.default_backend() == "gpu":
        x = jax.ShapeDtypeStruct((1, length, 1, head_dim), dtype)
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):  # what JAX says where it cannot be
            jax.eval_shape(lambda x: causal_attention(x, x, x, "cudnn"), x)
            return "cudnn"
    return "blocks"


def splash_takes(length: int, head_dim: int) -> bool:
    """Whether the TPU's kernel takes so many positions, and heads of that width."""
    return length % 128 == 0 and head_dim % 128 == 0


def _in_blocks(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    if T <= BLOCK:
        return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True)
    padded = jnp.pad(q_BTNH, [(0, 0), (0, -T % BLOCK), (0, 0), (0, 0)])
    blocks = jnp.moveaxis(padded.reshape(B, -1, BLOCK, N, H), 1, 0)

    @jax.checkpoint
    def of_block(first_and_block):
        first, q = first_and_block
        is_seen = (first + jnp.arange(BLOCK))[:, None] >= jnp.arange(T)
        return jax.nn.dot_product_attention(q, k_BTKH, v_BTKH, mask=is_seen[None, None])

    out = lax.map(of_block, (jnp.arange(blocks.shape[0]) * BLOCK, blocks))
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, N, H)[:, :T]


def _splash(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, interpret: bool) -> jax.Array:
    # Imported here: it is slow, and Pallas' TPU part is not to be had in every build of JAX.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N, H = q_BTNH.shape[1:]
    block = next(size for size in (512, 256, 128) if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((T, T)) for _ in range(N)])
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (q_BTNH / math.sqrt(H), k_BTKH, v_BTKH)]
    out_BNTH = jnp.asarray(jax.vmap(kernel)(*heads_first))
    return jnp.swapaxes(out_BNTH, 1, 2).astype(q_BTNH.dtype)
