"""The devices of a run: the processes that own them, the mesh that they form, and arrays that are spread over it."""

from __future__ import annotations

from typing import Any, NamedTuple

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


def wait_for_all(done: str) -> None:
    """Until all processes are here; ``done`` says what they have done, in the error that one of them is missing."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(done)


class Rows(NamedTuple):
    """Which rows of a batch a process's devices need; others may need the same ones."""

    rows: np.ndarray
    """Ascending."""
    part: int
    """Which of the parts they are, that a batch is cut into."""
    parts: int


def rows_here(sharding: NamedSharding | None, batch_size: int) -> Rows:
    """This process's rows of a batch; all where no mesh spreads it."""
    if sharding is None:
        return Rows(np.arange(batch_size), 0, 1)
    by_process: dict[int, set[int]] = {}
    for device, (index, *_) in sharding.devices_indices_map((batch_size,)).items():
        by_process.setdefault(device.process_index, set()).update(range(*index.indices(batch_size)))
    distinct = sorted({tuple(sorted(rows)) for rows in by_process.values()})
    mine = tuple(sorted(by_process[jax.process_index()]))
    return Rows(np.array(mine), distinct.index(mine), len(distinct))


def spread_rows(batch: Any, sharding: NamedSharding | None, rows: np.ndarray, batch_size: int) -> Any:
    """A batch of which each process has the rows that `rows_here` names, put where they belong."""
    if sharding is None:
        return batch

    def put(mine: np.ndarray) -> jax.Array:
        def part(index):
            wanted = np.arange(batch_size)[index[0]]
            return mine[np.searchsorted(rows, wanted)][:, *index[1:]]

        return jax.make_array_from_callback((batch_size, *mine.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)


def spread(tree: Any, sharding: NamedSharding | None) -> Any:
    """Arrays that each process has whole, put where their parts belong."""
    if sharding is None:
        return tree
    put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    return jax.tree.map(put, tree)


def spread_batches(sharding: NamedSharding | None) -> NamedSharding | None:
    """Of batches stacked along a new first axis."""
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def gather(tree: Any) -> Any:
    """The arrays of a tree, whole, in the memory of each process."""

    def whole(x: jax.Array) -> np.ndarray:
        is_here = x.is_fully_addressable or x.is_fully_replicated
        return np.asarray(x) if is_here else np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)
