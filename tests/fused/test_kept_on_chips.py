"""By the compilers of a TPU and a GPU, stacks of kept weights are updated in place: none is copied or decoded whole."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

INSTALLED = {"tpu-v5e": "libtpu", "h100": "jax_cuda13_plugin"}


@pytest.mark.parametrize("weights", ["int8", "bf16+8"])
@pytest.mark.parametrize("target", INSTALLED)
def test_stacks_are_updated_in_place_and_read_by_the_layer(target, weights):
    if importlib.util.find_spec(INSTALLED[target]) is None:
        pytest.skip(f"{INSTALLED[target]} is not installed")
    script = Path(__file__).parent / "kept_on_chips.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), target, weights]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["in_place"] >= found["params_and_state"]
    for program in ("step", "evaluation"):
        assert found[program]["floats_of_stacks"] == [], program
    # Beside their arguments they need less than a tenth of the least stack.
    assert found["step"]["temporaries"] < found["saved"] + 0.1 * found["least_stack"]
    assert found["evaluation"]["temporaries"] < 0.1 * found["least_stack"]
