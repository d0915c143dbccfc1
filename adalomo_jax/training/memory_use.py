"""How much memory the process or its accelerator has used."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import jax


def peak_bytes() -> int | None:
    """The accelerator's peak, or on a CPU the largest resident set of the process; None if neither is known."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    return _peak_resident_bytes()


def _peak_resident_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_freed_memory() -> None:
    """Hands memory that the process has freed back to the system, if its C library keeps it, as GNU's does.

    After XLA has compiled a step for a CPU, that is hundreds of megabytes. The step's own memory would come on top.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
