"""The compiler for a TPU v5e confirms the memory of models as found. It needs libtpu, but no chip."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiled import Memory

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

LIBTPU = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
"""These let libtpu compile for an absent chip."""
NAMES = ["linen bfloat16", "linen axis 1 cast", "nnx scan", "encoder-decoder", "experts mixed"]


@pytest.fixture(scope="module")
def memory():
    """The memory of each model, from one process for all: it starts slowly and has to set up JAX for itself."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), *sys.path])
    command = [sys.executable, str(tests / "tpu_memory.py"), *NAMES]
    done = subprocess.run(command, env=os.environ | LIBTPU | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: Memory(**numbers) for name, numbers in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_state_are_updated_in_place(memory, name):
    assert memory[name].updated_in_place >= memory[name].params_and_state


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_stacks_never_exist(memory, name):
    assert memory[name].saved >= 0.9


@pytest.mark.parametrize("name", NAMES)
def test_temporaries_are_small_beside_the_stacks(memory, name):
    """The unfused step also makes stacks in bfloat16 here, so one copy of a stack would not show in the test above."""
    assert memory[name].temporaries < 0.1 * memory[name].stacks


@pytest.mark.parametrize("name", NAMES)
def test_no_stack_is_cast_at_once(memory, name):
    assert memory[name].narrow_stacks == []


def test_the_search_for_casts_finds_them(memory):
    """The unfused step has them, because the compiler moves the layers' casts out of the loop."""
    assert any(array.startswith("bf16[32,") for array in memory["linen bfloat16"].narrow_stacks_unfused)
