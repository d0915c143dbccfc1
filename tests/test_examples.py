"""Each example runs to its end and checks itself, in less than a minute if no other test runs beside it."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import slow

HANGS = 300
"""Timeout in seconds: no example takes this long, even on a machine that is busy with other tests."""
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
SET_UP = {path for path in EXAMPLES if path.stem in ("fit_on_one_chip", "sharded_finetune")}
"""These set up JAX before it starts, so each runs in a process of its own."""
NEEDS = {"gemma_lists": "gemma", "lists_of_layers": "tunix", "tunix_qwen3": "tunix"}
"""The package that each example is about, and that no extra installs."""
QUICK = {path for path in EXAMPLES if path.stem == "optax_quickstart"}
"""The others compile whole models for half a minute each, so they run in the slow tier."""


@pytest.mark.parametrize(
    "path", [path if path in QUICK else slow(path) for path in EXAMPLES], ids=lambda path: path.stem
)
def test_example_runs(path, monkeypatch):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    if path in SET_UP:
        subprocess.run([sys.executable, path], check=True, capture_output=True, timeout=HANGS)
    else:
        monkeypatch.setattr(sys, "argv", [str(path)])
        runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) < 100
