"""By the compilers of a TPU and a GPU, int8 stacks are updated in place: none is copied or decoded whole."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

INSTALLED = {"tpu-v5e": "libtpu", "h100": "jax_cuda13_plugin"}


@pytest.mark.parametrize("target", INSTALLED)
def test_stacks_are_updated_in_place(target):
    if importlib.util.find_spec(INSTALLED[target]) is None:
        pytest.skip(f"{INSTALLED[target]} is not installed")
    script = Path(__file__).parent / "kept_on_chips.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(script), target], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["in_place"] >= found["params_and_state"]
    assert found["floats_of_stacks"] == []
    # All that the step needs beside its arguments is less than one of seven stacks.
    assert found["temporaries"] - found["saved"] < 0.9 * found["one_stack"]
