"""Stacks in host memory, and the transfer of one layer of them at a time.

The type of an array says which memory it is in, so nothing else has to: code that reads a layer of a stack in host
memory fetches it, and code that writes a layer puts it back there. Only whole matrices are moved: a TPU's compiler
can slice nothing else out of an array in host memory (libtpu 0.0.52), and vectors take next to no memory.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from adalomo_jax import jax_versions
from adalomo_jax.optimizers.kept import as_floats, is_kept

HOST = "pinned_host"
"""The memory kind of host memory that an accelerator reads by itself."""
DEVICE = "device"
"""The memory kind of the accelerator's own memory."""


def is_on_host(x: Any) -> bool:
    """Whether a weight, traced or not, is in host memory."""
    return any(jax_versions.memory_space(part) == jax_versions.HOST for part in jax.tree.leaves(x))


def fetch(x: Any) -> Any:
    """The weight on the device; the same one if it is on the device already."""
    return jax.tree.map(lambda part: jax.device_put(part, jax_versions.DEVICE), x) if is_on_host(x) else x


def put_beside(x: Any, other: Any) -> Any:
    """``x`` in the memory that ``other`` is in."""
    put = lambda part: jax.device_put(part, jax_versions.HOST)
    return jax.tree.map(put, x) if is_on_host(other) else x


def put_on_host(x: Any) -> Any:
    """An array of two or more axes, in host memory; others stay where they are."""
    return jax.device_put(x, jax_versions.HOST) if x.ndim >= 2 else x


def shapes_on_device(leaves: Sequence[Any]) -> list[Any]:
    """The arrays; weights in host memory or in another form as the shape, dtype and sharding of their floats."""
    known = lambda x: not (is_on_host(x) or is_kept(x))
    return [x if known(x) else jax.eval_shape(lambda x: as_floats(fetch(x)), x) for x in leaves]


def place(x: Any, *, on_host: bool) -> Any:
    """The weight in this memory, sharded as before; for ``jax.ShapeDtypeStruct``s, the description of that weight.

    Raises:
      ValueError: if it must go to host memory, but the backend has no such memory.
    """
    return jax.tree.map(lambda part: _place(part, on_host), x)


def _place(x: Any, on_host: bool) -> Any:
    sharding = getattr(x, "sharding", None)
    if not on_host and (sharding is None or sharding.memory_kind != HOST):
        return x
    sharding = _of_kind(_named(sharding), HOST if on_host else DEVICE)
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(sharding=sharding)
    return jax.device_put(x, sharding)


def _named(sharding: Sharding | None) -> NamedSharding:
    """The sharding, with a mesh: in a description JAX reads the memory kind from no other kind (seen up to 0.12)."""
    if isinstance(sharding, NamedSharding):
        return sharding
    devices = jax.devices()[:1] if sharding is None else list(sharding.device_set)
    if len(devices) > 1:
        raise ValueError(
            f"A stack that is offloaded must have a NamedSharding, or be on one device, but it has {sharding}. "
            "Move it to one with jax.device_put first."
        )
    return NamedSharding(Mesh(np.array(devices), ("device",)), PartitionSpec())


def _of_kind(sharding: NamedSharding, kind: str) -> NamedSharding:
    try:
        return sharding.with_memory_kind(kind)
    except ValueError as error:
        raise ValueError(
            f"step.place moves stacks of matrices to the memory kind {kind!r} for offload='params', and there is none. "
            f"Leave offload out on this backend. ({error})"
        ) from error
