"""Keeps compiled programs, so that a command that compiles the same again starts at once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax


def use_compilation_cache() -> None:
    """Has JAX keep programs that take more than a second to compile, and load them the next time.

    JAX's own settings hold: ``JAX_COMPILATION_CACHE_DIR`` names another folder, and
    ``JAX_ENABLE_COMPILATION_CACHE=false`` keeps nothing.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(RuntimeError):  # a user without a home
            jax.config.update("jax_compilation_cache_dir", str(cache_folder()))


def cache_folder() -> Path:
    """A folder below the user's cache folder, one for each kind of processor.

    A program for one CPU may hold instructions that another lacks, and JAX does not check which CPU it was for. In a
    home that several machines share, a program would end at the first of them.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "adalomo-jax" / f"compiled-{hashlib.sha256(_instructions().encode()).hexdigest()[:12]}"


def _instructions() -> str:
    """A text that tells processors with different instructions apart."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    known = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(known)])
