"""SIGTERM, with which a scheduler asks a run to stop: all processes agree on the step after which they stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adalomo_jax.models.sharding import everywhere


@contextlib.contextmanager
def stop_requests(mesh: Mesh | None) -> Iterator[Callable[[], bool]]:
    """Yields the function that says whether to stop. All processes call it once a step, and get the same answer.

    Inside, SIGTERM only makes it true. Several processes hear of it one call later, so that a step need not be over
    before the devices get the next one. Outside of the main thread Python can handle no signals: it is never true
    there.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set if mesh is None or jax.process_count() == 1 else _agreement(mesh, asked)
    finally:
        # None: a handler that is not Python's, which cannot be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def _agreement(mesh: Mesh, asked: threading.Event) -> Callable[[], bool]:
    """A function that says whether any process had been asked to stop at its previous call."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    any_of = jax.jit(jnp.max, out_shardings=everywhere(mesh))
    pending: list[jax.Array] = []

    def agreed() -> bool:
        mine = np.full(mesh.size, asked.is_set(), np.int32)
        pending.append(any_of(jax.make_array_from_callback(mine.shape, sharding, lambda index: mine[index])))
        return len(pending) > 1 and bool(pending.pop(0))

    return agreed
