"""What an array takes in the memory of a TPU, which keeps it in tiles of 8 x 128, and which way round it lies."""

from __future__ import annotations

import math
from typing import Any

LANES = 128
"""Elements of a tile's row."""
SUBLANES = 8
"""Rows of a tile."""
VECTOR_TILE_BYTES = 512
"""The least that a vector or a scalar takes."""


def row_major_bytes(x: Any) -> int:
    """Bytes of an array whose last dimension lies along the lanes: the last two are filled up to whole tiles.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> row_major_bytes(jax.ShapeDtypeStruct((30, 576, 192), jnp.bfloat16)) == 30 * 576 * 256 * 2
        True
    """
    itemsize = x.dtype.itemsize
    if x.ndim < 2:
        tile = max(VECTOR_TILE_BYTES // itemsize, min(SUBLANES * LANES, _power_of_two(math.prod(x.shape))))
        return _whole(math.prod(x.shape), tile) * itemsize
    *outer, rows, columns = x.shape
    # Of fewer rows than eight, a tile has the next power of two.
    return math.prod(outer) * _whole(rows, min(SUBLANES, _power_of_two(rows))) * _whole(columns, LANES) * itemsize


def lies_transposed(x: Any) -> bool:
    """Whether an argument lies with its last two dimensions swapped, as libtpu has it where less is filled up so.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> [lies_transposed(jax.ShapeDtypeStruct(s, jnp.bfloat16)) for s in [(512, 576), (576, 512), (64, 576)]]
        [True, False, False]
    """
    return x.ndim >= 2 and row_major_bytes(_swapped(x)) < row_major_bytes(x)


def tiled_bytes(x: Any) -> int:
    """Bytes of an argument, whichever way round it lies."""
    return min(row_major_bytes(x), row_major_bytes(_swapped(x))) if x.ndim >= 2 else row_major_bytes(x)


def _swapped(x: Any) -> Any:
    return x.update(shape=(*x.shape[:-2], x.shape[-1], x.shape[-2]), sharding=None)


def _whole(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def _power_of_two(size: int) -> int:
    """The least that is not below."""
    return 1 << max(size - 1, 0).bit_length()
