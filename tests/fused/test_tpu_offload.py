"""The compiler for a TPU v5e confirms what offloading saves. It needs libtpu, but no chip."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

LIBTPU = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
"""These let libtpu compile for an absent chip."""
OF_PARAMS = ["params", "both", "both, clipped microbatches"]
OF_ACTIVATIONS = ["activations", "both", "both, clipped microbatches"]


@pytest.fixture(scope="module")
def sizes():
    """The sizes of each case, from one process for all: it starts slowly and has to set up JAX for itself."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), *sys.path])
    command = [sys.executable, str(tests / "tpu_offload.py")]
    done = subprocess.run(command, env=os.environ | LIBTPU | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("case", OF_PARAMS)
def test_matrices_are_on_the_host_and_updated_in_place_there(sizes, case):
    assert sizes[case]["host_aliases"] == sizes[case]["host_arguments"] >= sizes[case]["matrices"]
    assert sizes[case]["arguments"] < 0.05 * sizes[case]["matrices"]


@pytest.mark.parametrize("case", OF_ACTIVATIONS)
def test_layer_inputs_are_on_the_host(sizes, case):
    assert sizes[case]["host_temporaries"] >= sizes[case]["layer_inputs"]


@pytest.mark.parametrize("case", OF_ACTIVATIONS)
def test_temporaries_hold_neither_stacks_nor_layer_inputs(sizes, case):
    assert sizes[case]["temporaries"] < 0.2 * sizes[case]["layer_inputs"] < 0.2 * sizes[case]["matrices"]


def test_the_stream_of_layers_costs_little(sizes):
    """The step fetches single layers, neither a stack nor a part of one that grows with the depth."""
    fetched = sizes["params"]["temporaries"] - sizes["plain"]["temporaries"]
    assert fetched < 3 * sizes["params"]["matrices"] / sizes["params"]["layers"]


def test_without_offload_nothing_is_on_the_host(sizes):
    plain = sizes["plain"]
    assert plain["host_arguments"] == plain["host_aliases"] == plain["host_temporaries"] == 0
    assert plain["arguments"] >= plain["matrices"] and plain["temporaries"] >= plain["layer_inputs"]
