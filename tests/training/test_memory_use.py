"""Memory that the process has freed goes back to the system."""

import platform
from pathlib import Path

import pytest

from adalomo_jax.training.memory_use import peak_bytes, release_freed_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads Linux's /proc; the heap is GNU's")

PAGE = 4096


def resident():
    return PAGE * int(Path("/proc/self/statm").read_text().split()[1])


def test_what_is_freed_below_something_that_is_not_is_given_back():
    blocks = [bytes(1000) for _ in range(300_000)]
    last = blocks[-1]
    del blocks
    before = resident()
    release_freed_memory()
    assert before - resident() > 2e8
    assert len(last) == 1000


def test_the_peak_is_at_least_what_is_resident():
    assert (peak_bytes() or 0) >= 0.9 * resident()
