"""Which arrays share memory: each array that a step updates in place needs its own."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def buffer_of(x: Any) -> Any:
    """A value that is equal for arrays that share memory on their first device; None if ``x`` has no memory yet."""
    if not isinstance(x, jax.Array) or isinstance(x, Tracer) or x.is_deleted() or not x.size:
        return None
    try:
        shard = x if len(x.sharding.device_set) == 1 else x.addressable_data(0)
        return shard.device, shard.unsafe_buffer_pointer()
    except Exception:  # keys, and some backends, have no pointers; one array under two names is found all the same
        return id(x)


def check_apart(donated: Any, used: Any) -> None:
    """Refuses one array under two names if the first is donated.

    Args:
      donated: a dict of trees by name, which the step updates in place.
      used: a dict of trees by name, which the step only reads.
    """
    names: dict[Any, str] = {}
    for tree, is_donated in ((donated, True), (used, False)):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            buffer = buffer_of(x)
            if buffer is None:
                continue
            name = f"{path[0].key}{jax.tree_util.keystr(path[1:])}"
            if buffer in names:
                raise ValueError(
                    f"{names[buffer]} and {name} are one array, which step.jit would update in place under both names. "
                    "Copy one of them with jnp.copy; or, for tied weights, keep one leaf that the loss reads twice."
                )
            if is_donated:
                names[buffer] = name


def with_own_memory(leaves: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The arrays; those that share memory with each other or with ``others`` are copied."""
    taken = {buffer_of(x) for x in others}
    apart = []
    for x in leaves:
        buffer = buffer_of(x)
        if buffer is not None and buffer in taken:
            x = jax.device_put(jnp.copy(x), x.sharding)
            buffer = buffer_of(x)
        taken.add(buffer)
        apart.append(x)
    return apart
