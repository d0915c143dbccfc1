"""Lists of layers at a 7B model's widths need no more memory than unfused, by the compilers for absent chips."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import lists_at_width
import pytest

FEW, MORE = 2, 5
INSTALLED = {"tpu-v5e": "libtpu", "tpu-v6e": "libtpu", "h100": "jax_cuda13_plugin", "rtx-4090": "jax_cuda13_plugin"}
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("target", INSTALLED)]


@functools.cache
def over_weights(target):
    """The bytes beyond the weights, by layers and step. A process that sets up JAX for itself measures them."""
    if importlib.util.find_spec(INSTALLED[target]) is None:
        pytest.skip(f"{INSTALLED[target]} is not installed")
    command = [sys.executable, lists_at_width.__file__, target, str(FEW), str(MORE)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = list(map(json.loads, done.stdout.splitlines()))
    return {(row["layers"], row["step"]): row["over_weights"] for row in rows}


@pytest.mark.parametrize("layers", [FEW, MORE])
def test_a_list_needs_no_more_than_the_unfused_step(target, layers):
    found = over_weights(target)
    assert found[layers, "in a list"] <= found[layers, "unfused"]


def test_nor_does_it_stacked(target):
    found = over_weights(target)
    assert found[MORE, "stacked"] <= found[MORE, "unfused"]


def test_a_layer_more_of_a_list_costs_little_more_than_its_saved_input(target):
    """The rest is the layer's state and what the compiler keeps."""
    found = over_weights(target)
    per_layer = (found[MORE, "in a list"] - found[FEW, "in a list"]) / (MORE - FEW)
    assert per_layer - lists_at_width.SAVED_BYTES <= 0.03e9
