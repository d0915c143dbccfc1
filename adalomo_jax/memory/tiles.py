"""What an array takes in the memory of a TPU, which keeps it in tiles of 8 x 128, and which way round it lies."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

LANES = 128
"""Elements of a tile's row."""
SUBLANES = 8
"""Rows of a tile."""


def row_major_bytes(x: Any) -> int:
    """Bytes of an array whose last dimension lies along the lanes: the last two are filled up to whole tiles.

    Example:
        >>> import jax
        >>> row_major_bytes(jax.ShapeDtypeStruct((30, 576, 192), jnp.bfloat16)) == 30 * 576 * 256 * 2
        True
    """
    *outer, rows, columns = (1, 1, *x.shape)[-max(2, x.ndim) :]
    # A row alone is laid out by itself, without seven empty ones.
    rows = rows if rows == 1 else _whole(rows, SUBLANES)
    return math.prod(outer) * rows * _whole(columns, LANES) * jnp.dtype(x.dtype).itemsize


def lies_transposed(x: Any) -> bool:
    """Whether an argument lies with its last two dimensions swapped, as libtpu has it where less is filled up so.

    Example:
        >>> import jax
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
