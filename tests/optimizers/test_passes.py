"""In compiled programs, the update of a matrix passes over it no more often than its equations need."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import loop_passes
import passes
import pytest

from adalomo_jax.optimizers import sums

LEAST_BYTES = 24
"""Bytes per float32 weight; see moments.py."""
LEAST = {"reads_of_gradient": 3, "reads_of_weights": 2, "writes": 1}
FLOATS = ("float32", "bfloat16, to nearest", "bfloat16")
OF_FORMS = {
    "gpu": {"bf16+8": LEAST, "int8": LEAST | {"reads_of_gradient": 4, "reads_of_weights": 3}},
    "tpu": {
        "bf16+8": {"reads_of_gradient": 4, "reads_of_weights": 3, "writes": 3},
        "int8": {"reads_of_gradient": 3, "reads_of_weights": 3, "writes": 2},
    },
}
"""Passes over weights in other forms. int8 takes one more read of both, for the largest weight of each block. A TPU's
compiler writes the update for it, which two kernels read, and not the gradient. It gives each of the two arrays of
bf16+8 a kernel of its own, and writes one by way of temporary memory."""
TEMPORARIES = {"gpu": {"bf16+8": 0.1, "int8": 0.1}, "tpu": {"bf16+8": 1.1, "int8": 2.1}}
"""The most bytes of temporary memory per weight that they take."""
INSTALLED = {"tpu-v5e": "libtpu", "tpu-v6e": "libtpu", "h100": "jax_cuda13_plugin", "rtx-4090": "jax_cuda13_plugin"}


@pytest.mark.uncached
def test_bytes_moved_on_a_cpu_are_the_least():
    found = passes.passes_of("cpu", jnp.float32)
    assert found.bytes_accessed is not None and LEAST_BYTES <= found.bytes_accessed <= 1.15 * LEAST_BYTES
    assert found.temporaries < 0.1
    assert found._asdict() | LEAST == found._asdict()


@pytest.mark.uncached
def test_two_sums_over_rows_would_move_more_on_a_cpu(monkeypatch):
    monkeypatch.setattr(sums, "sums_as_one", sums.sums_as_two)
    found = passes.passes_of("cpu", jnp.float32)
    assert found.bytes_accessed is not None and found.bytes_accessed > 1.15 * LEAST_BYTES


@pytest.mark.parametrize("target", INSTALLED)
def test_chips_pass_over_it_no_more_often_than_needed_and_write_no_other_matrix(target):
    rows = {row["weights"]: row for row in rows_of(passes, target)}
    kind = "tpu" if target.startswith("tpu") else "gpu"
    assert set(rows) == {*FLOATS, *OF_FORMS[kind]}
    for weights in FLOATS:
        assert rows[weights] | LEAST == rows[weights]
        assert rows[weights]["temporaries"] < 0.1
    for weights, expected in OF_FORMS[kind].items():
        assert rows[weights] | expected == rows[weights]
        assert rows[weights]["temporaries"] < TEMPORARIES[kind][weights]


@pytest.mark.parametrize("target, reads_of_gradient", [("tpu-v5e", 2), ("h100", 3), ("rtx-4090", 3)])
def test_in_the_fused_step_too_where_a_tpu_takes_the_first_sums_in_the_product(target, reads_of_gradient):
    rows = rows_of(loop_passes, target)
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    least = {"reads_of_gradient": reads_of_gradient, "reads_of_weights": 2, "writes_of_weights": 1}
    for row in rows:
        assert row | least | {"stacks_copied": [], "wide_copies": []} == row


def rows_of(program, target):
    """The rows that a script prints, in a process of its own, because it must set JAX up for itself."""
    if importlib.util.find_spec(INSTALLED[target]) is None:
        pytest.skip(f"{INSTALLED[target]} is not installed")
    command = [sys.executable, str(Path(program.__file__)), target]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
