"""Short numbers that tell arrays apart: the data of a run, and arrays that come back from a disk."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from adalomo_jax.text.data import Data
from adalomo_jax.training.devices import gather

_ODD = 0x9E3779B1
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def data_fingerprint(data: Data) -> str:
    """SHA-256 of the packed sequences of both parts, in hexadecimal. It does not depend on where the text was."""
    digest = hashlib.sha256()
    for packed in (data.train, data.evaluation):
        for array in (packed.tokens_NT, packed.segments_NT, packed.learned_NT):
            digest.update(f"{array.dtype.str} {array.shape};".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """A number of 32 bits for each array. It depends on every bit, and not on how the array is spread over devices.

    It is the sum, modulo 2**32, of the elements' bits, each multiplied by an odd number that depends on its place. So
    it always shows one element that differs, and misses any other damage with a chance of one in some four billion. It
    is computed where the arrays are, and takes the memory of a layer.

    Args:
        arrays: of types of 1, 2 or 4 bytes.

    Example:
      >>> sums = checksums({"a": jnp.zeros(3), "b": jnp.array([1, 0], jnp.int8), "c": jnp.array([0, 1], jnp.int8)})
      >>> sums["a"], sums["b"], sums["b"] == sums["c"]
      (0, 1, False)
    """
    return {name: int(value) for name, value in gather(_checksums(dict(arrays))).items()}


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(_checksum, arrays)


def _checksum(x: jax.Array) -> jax.Array:
    """Of stacks one layer at a time: on a CPU, XLA holds what it adds up as an array of its own."""
    if x.ndim < 3 or x.size == 0:
        return _sum_of_bits(x, jnp.uint32(0))
    size = jnp.uint32(math.prod(x.shape[1:]) % 2**32)

    def add_layer(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + _sum_of_bits(x[i], i.astype(jnp.uint32) * size)

    return jax.lax.fori_loop(0, x.shape[0], add_layer, jnp.uint32(0))


def _sum_of_bits(x: jax.Array, place: jax.Array) -> jax.Array:
    """The sum of an array whose first element has this place."""
    word = _WORDS[x.dtype.itemsize]
    words = (x.astype(word) if x.dtype == bool else jax.lax.bitcast_convert_type(x, word)).astype(jnp.uint32)
    places, stride = jnp.broadcast_to(place, x.shape), 1
    for axis in reversed(range(x.ndim)):
        places += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    mixed = places * jnp.uint32(_ODD)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA77)
    return jnp.sum(words * ((mixed ^ (mixed >> 13)) | 1), dtype=jnp.uint32)
