"""Runs the command in a process of its own, because it must set JAX up for itself."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest


def installed(module):
    """Whether a plugin is installed."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


needs_libtpu = pytest.mark.skipif(not installed("libtpu"), reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(not installed("jax_plugins.xla_cuda13"), reason="the CUDA plugin is not installed")


def memory_rows(*options):
    """The rows that the command prints, by name. The command runs in a user's environment, which sets no platform.

    The command compiles for its figures: it reads no compilation cache.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-m", "adalomo_jax", "memory", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
