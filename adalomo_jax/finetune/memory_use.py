"""How much memory the process or its accelerator has used."""

from __future__ import annotations

import sys

import jax


def peak_bytes() -> int | None:
    """The accelerator's peak, or on a CPU the largest resident set of the process; None where neither is known."""
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
