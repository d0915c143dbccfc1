"""The devices of a run: the processes that own them, the mesh that they form, and arrays that are spread over it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adalomo_jax.finetune.config import FinetuneConfig, InputError, mesh_sizes
from adalomo_jax.models import make_mesh


def connect(config: FinetuneConfig) -> None:
    """Join the other processes of the run, where there are any. To be called before JAX has made an array."""
    if config.coordinator is None:
        return
    if config.coordinator == "auto":
        jax.distributed.initialize(num_processes=config.processes, process_id=config.process)
    else:
        jax.distributed.initialize(config.coordinator, config.processes, config.process)


def mesh_of(config: FinetuneConfig) -> Mesh | None:
    """The mesh that the options name, of all devices of all processes; None for one device."""
    sizes = mesh_sizes(config.mesh, "--mesh")
    if not sizes:
        return None
    try:
        return make_mesh(sizes)
    except ValueError as error:
        raise InputError(f"--mesh {config.mesh}: {str(error).rstrip('.')}") from None


def is_first_process() -> bool:
    """Whether this process writes and prints."""
    return jax.process_index() == 0


def spread(array: np.ndarray, sharding: NamedSharding | None) -> Any:
    """An array that each process has whole, put where its parts belong."""
    if sharding is None:
        return array
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def spread_batches(sharding: NamedSharding | None) -> NamedSharding | None:
    """Of batches stacked along a new first axis."""
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def gather(tree: Any) -> Any:
    """The arrays of a tree, whole, in the memory of each process."""

    def whole(x: jax.Array) -> np.ndarray:
        is_here = x.is_fully_addressable or x.is_fully_replicated
        return np.asarray(x) if is_here else np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)
