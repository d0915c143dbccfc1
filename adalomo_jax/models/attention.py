"""Causal attention in the memory of a few rows of scores, with the kernel that a backend has for it.

Letters in names of arrays: B batch, T position, N query heads, K key and value heads, H width of a head.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from adalomo_jax.models.tiled_attention import TILES, Scores, capped, is_seen, tiled_attention

Kind = Literal["blocks", "tiles", "splash", "cudnn"]

BLOCK = 512
"""The number of queries whose scores exist at once, in blocks of plain XLA operations."""


def causal_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    kind: Kind = "blocks",
    *,
    segments_BT: jax.Array | None = None,
    window: int | None = None,
    is_windowed: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sharding: NamedSharding | None = None,
    interpret: bool = False,
) -> jax.Array:
    """``softmax(scale * q k^T) v`` over the positions that a query sees; ``N / K`` query heads share each key head.

    A query sees the positions up to its own. If segments or a window are given, it sees only those within them.

    Args:
      q_BTNH: queries.
      k_BTKH: keys.
      v_BTKH: values.
      kind: ``"blocks"`` runs anywhere, in blocks of 512 queries, whose scores are recomputed in the backward pass.
        ``"tiles"`` does the same for CPUs, in smaller blocks, with a gradient of its own (`tiled_attention`).
        ``"splash"`` is JAX's kernel for TPUs, ``"cudnn"`` NVIDIA's for GPUs.
      segments_BT: the number of the document that each position belongs to.
      window: how many positions a query sees, its own included.
      is_windowed: a traced bool, whether there is this window: layers of one scan may differ. Tiles and kernels, which
        skip what no query sees, then have a branch for each.
      scale: the factor of the scores; None is ``1 / sqrt(H)``.
      softcap: if given, scores ``s`` become ``softcap * tanh(s / softcap)``. cuDNN has no such scores.
      sharding: the sharding of a batch that is spread over a mesh; heads are spread over its axis ``tensor``. Tiles and
        kernels run on each device's part, with all heads if ``tensor`` does not divide the number of key heads; XLA
        spreads blocks by itself.
      interpret: run the TPU's kernel in the interpreter, slowly, on any backend.

    Returns:
      ``[B, T, N, H]``, in the dtype of the queries.

    Raises:
      ValueError: the kernel does not take heads this wide or this many positions; see `splash_takes`.
    """
    if kind == "splash" and not splash_takes(q_BTNH.shape[1], q_BTNH.shape[-1]):
        T, H = q_BTNH.shape[1], q_BTNH.shape[-1]
        raise ValueError(
            f"attention='splash' takes a multiple of 128 positions and heads 128 wide, got {T} positions and heads "
            f"{H} wide. Take attention='blocks'."
        )
    if kind == "cudnn" and softcap is not None:
        raise ValueError("attention='cudnn' takes no softcap. Take attention='blocks'.")
    if kind == "blocks":
        return _in_blocks(q_BTNH, k_BTKH, v_BTKH, segments_BT, Scores(scale, softcap, window, is_windowed))
    if is_windowed is not None:
        options: dict[str, Any] = dict(scale=scale, softcap=softcap, sharding=sharding, interpret=interpret)
        branch = lambda window: (
            lambda q, k, v: causal_attention(q, k, v, kind, segments_BT=segments_BT, window=window, **options)
        )
        return lax.cond(is_windowed, branch(window), branch(None), q_BTNH, k_BTKH, v_BTKH)
    scores = Scores(scale, softcap, window)
    kernel = {
        "tiles": partial(tiled_attention, scores=scores),
        "cudnn": partial(_cudnn, scores=scores),
        "splash": partial(_splash, scores=scores, interpret=interpret),
    }[kind]
    segments = () if segments_BT is None else (segments_BT,)
    if sharding is None or sharding.mesh.size == 1:
        return kernel(q_BTNH, k_BTKH, v_BTKH, *segments)
    heads = "tensor" if k_BTKH.shape[2] % sharding.mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(*sharding.spec, None, heads)
    specs = ((spec,) * 3 + (PartitionSpec(*sharding.spec),))[: 3 + len(segments)]
    on_parts = jax.shard_map(kernel, mesh=sharding.mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return on_parts(q_BTNH, k_BTKH, v_BTKH, *segments)


def cached_attention(
    q_BQNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, first: int | jax.Array, scores: Scores
) -> jax.Array:
    """The rows of ``causal_attention`` only for the queries at the positions ``first``, ``first + 1``, ....

    Args:
      q_BQNH: queries.
      k_BTKH: keys of the positions 0, 1, ...; those after a query's own may hold anything finite.
      v_BTKH: values.
      first: the position of the first query; it may be traced.
      scores: the scores, and the window.

    Returns:
      ``[B, Q, N, H]``, in the dtype of the queries.
    """
    return _in_blocks(q_BQNH, k_BTKH, v_BTKH, None, scores, first)


def kind_for(platform: str, length: int, head_dim: int, dtype: Any, softcap: float | None = None) -> Kind:
    """The best kind for a platform (``"tpu"``, ``"gpu"``, ``"cuda"`` or ``"cpu"``): its own kernel if available.

    This process looks for cuDNN itself, so a program that it compiles for a GPU elsewhere has blocks.
    """
    if platform == "tpu" and splash_takes(length, head_dim):
        return "splash"
    if platform in ("gpu", "cuda") and jax.default_backend() == "gpu" and softcap is None:
        x = jax.ShapeDtypeStruct((1, length, 1, head_dim), dtype)
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):  # raised if JAX cannot use cuDNN
            jax.eval_shape(lambda x: causal_attention(x, x, x, "cudnn"), x)
            return "cudnn"
    # Measured: tiles take less memory than blocks for 2048 positions, more for 4096.
    return "tiles" if platform == "cpu" and length <= TILES * BLOCK // 2 else "blocks"


def splash_takes(length: int, head_dim: int) -> bool:
    """Whether the TPU's kernel takes this many positions, and heads of this width."""
    return length % 128 == 0 and head_dim % 128 == 0


def _in_blocks(
    q_BQNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    scores: Scores,
    first: int | jax.Array = 0,
) -> jax.Array:
    (B, Q, N, H), keys = q_BQNH.shape, jnp.arange(k_BTKH.shape[1])
    window = scores.window
    if window is not None and scores.is_windowed is not None:
        window = jnp.where(scores.is_windowed, window, keys.size)
    if Q <= BLOCK:
        mask = is_seen(first + jnp.arange(Q), keys, segments_BT, segments_BT, window)
        return _attend(q_BQNH, k_BTKH, v_BTKH, mask, scores)
    in_blocks = lambda x: jnp.moveaxis(_padded(x).reshape(B, -1, BLOCK, *x.shape[2:]), 1, 0)
    blocks = in_blocks(q_BQNH)
    firsts = first + jnp.arange(blocks.shape[0]) * BLOCK

    @jax.checkpoint
    def of_block(first_block_and_segments):
        first, q, segments_BQ = first_block_and_segments
        mask = is_seen(first + jnp.arange(BLOCK), keys, segments_BQ, segments_BT, window)
        return _attend(q, k_BTKH, v_BTKH, mask, scores)

    out = lax.map(of_block, (firsts, blocks, None if segments_BT is None else in_blocks(segments_BT)))
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, N, H)[:, :Q]


def _attend(q_BQNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask: jax.Array, scores: Scores) -> jax.Array:
    if scores.softcap is None:
        return _of_jax(q_BQNH, k_BTKH, v_BTKH, mask=mask, scale=scores.scale)
    B, Q, N, H = q_BQNH.shape
    q_BQKGH = q_BQNH.reshape(B, Q, k_BTKH.shape[2], -1, H)
    s_BKGQT = jnp.einsum("bqkgh,btkh->bkgqt", q_BQKGH, k_BTKH, preferred_element_type=jnp.float32)
    s_BKGQT = capped(scores.factor(H) * s_BKGQT, scores.softcap)
    p_BKGQT = jax.nn.softmax(jnp.where(mask[:, :, None], s_BKGQT, jnp.finfo(jnp.float32).min), axis=-1)
    out_BQKGH = jnp.einsum("bkgqt,btkh->bqkgh", p_BKGQT.astype(v_BTKH.dtype), v_BTKH)
    return out_BQKGH.reshape(B, Q, N, H)


def _of_jax(*args: jax.Array, **options: Any) -> jax.Array:
    """JAX's attention, which implicitly promotes bfloat16 to float32 (JAX 0.12), even if users forbid that."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(*args, **options)


def _padded(x_BT: jax.Array) -> jax.Array:
    """The array, padded to a whole number of blocks. The padding's results are cut off later."""
    return jnp.pad(x_BT, [(0, 0), (0, -x_BT.shape[1] % BLOCK)] + [(0, 0)] * (x_BT.ndim - 2))


def _cudnn(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    scores: Scores,
) -> jax.Array:
    size = None if scores.window is None else (scores.window - 1, 0)
    mask = None if segments_BT is None else segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    options: dict[str, Any] = dict(scale=scores.scale, is_causal=True, local_window_size=size, implementation="cudnn")
    return _of_jax(q_BTNH, k_BTKH, v_BTKH, mask=mask, **options)


def _splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    scores: Scores,
    interpret: bool,
) -> jax.Array:
    # Imported here because it is slow, and not every build of JAX has Pallas' TPU part.
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
    window, cap = scores.window, scores.softcap
    seen = splash.CausalMask((T, T)) if window is None else splash.LocalMask((T, T), (window - 1, 0), 0)
    mask = splash.MultiHeadMask([seen for _ in range(N)])
    kernel = splash.make_splash_mha(
        mask, block_sizes=sizes, attn_logits_soft_cap=cap, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (q_BTNH * scores.factor(H), k_BTKH, v_BTKH)]
    segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BT)
    out_BNTH = jnp.asarray(jax.vmap(kernel)(*heads_first, segments))
    return jnp.swapaxes(out_BNTH, 1, 2).astype(q_BTNH.dtype)
