"""The devices of a run: the processes that own them, the mesh that they form, and arrays that are spread over it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adalomo_jax.inputs import InputError, mesh_sizes
from adalomo_jax.models import make_mesh
from adalomo_jax.training.config import FinetuneConfig


def connect(config: FinetuneConfig) -> None:
    """Join the other processes of the run, if there are any. Call it before JAX has made an array."""
    if config.coordinator is None:
        return
    if config.coordinator == "auto":
        jax.distributed.initialize(num_processes=config.processes, process_id=config.process)
    else:
        jax.distributed.initialize(config.coordinator, config.processes, config.process)


def mesh_of(config: FinetuneConfig) -> Mesh | None:
    """The mesh that the options name, over all devices of all processes; None for one device."""
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
    """Wait until all processes are here. ``done`` says what they have done, in the error if one of them is missing."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(done)


_DIGEST = 32
"""Bytes of a SHA-256."""
_MOST_PARTS = 8
"""Most parts that processes compare at once. Each part is a row of an array of one shape in all processes."""


def check_agreed(parts: Mapping[str, str] | None) -> None:
    """Have all processes compare what must be equal in them. A single process compares nothing.

    Args:
        parts: texts by names, the same ones in all processes; None from a process that has failed, and stops.

    Raises:
        InputError: they differ, or another process has failed. Each process raises the same line.
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(text.encode()).digest() for text in (parts or {}).values()]
    mine = np.zeros((_MOST_PARTS, _DIGEST), np.uint8)
    mine[: len(digests)] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, _DIGEST)
    all_of_them = np.asarray(multihost_utils.process_allgather(mine))
    if parts is None:
        return
    failed = [str(p) for p, of_process in enumerate(all_of_them) if not of_process.any()]
    if failed:
        raise InputError(f"process {', '.join(failed)} has stopped before training, and says why")
    for name, of_part in zip(parts, np.moveaxis(all_of_them, 1, 0)):
        other = [str(p) for p, digest in enumerate(of_part) if (digest != of_part[0]).any()]
        if other:
            raise InputError(
                f"the processes of a run must be given the same, but process {', '.join(other)} has other {name} than "
                "process 0"
            )


@contextlib.contextmanager
def told_to_all() -> Iterator[None]:
    """If this process fails inside, the others hear of it from `check_agreed`, which they call next."""
    try:
        yield
    except InputError:
        check_agreed(None)
        raise


class Rows(NamedTuple):
    """Which rows of a batch a process's devices need; others may need the same ones."""

    rows: np.ndarray
    """Ascending."""
    part: int
    """Which of the batch's parts they are."""
    parts: int


def rows_here(sharding: NamedSharding | None, batch_size: int) -> Rows:
    """This process's rows of a batch; all rows if no mesh spreads it."""
    if sharding is None:
        return Rows(np.arange(batch_size), 0, 1)
    by_process: dict[int, set[int]] = {}
    for device, (index, *_) in sharding.devices_indices_map((batch_size,)).items():
        by_process.setdefault(device.process_index, set()).update(range(*index.indices(batch_size)))
    distinct = sorted({tuple(sorted(rows)) for rows in by_process.values()})
    mine = tuple(sorted(by_process[jax.process_index()]))
    return Rows(np.array(mine), distinct.index(mine), len(distinct))


def spread_rows(batch: Any, sharding: NamedSharding | None, rows: np.ndarray, batch_size: int) -> Any:
    """A batch, put where its parts belong. Each process has the rows that `rows_here` names."""
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
    """The sharding of batches stacked along a new first axis."""
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def gather(tree: Any) -> Any:
    """The arrays of a tree, whole, in the memory of each process."""

    def whole(x: jax.Array) -> np.ndarray:
        is_here = x.is_fully_addressable or x.is_fully_replicated
        return np.asarray(x) if is_here else np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)
