"""Each example runs to its end, and checks itself there: in less than a minute, if no other test runs beside it."""

import subprocess
import sys
from pathlib import Path

import pytest

HANGS = 300
"""Seconds that no example takes on a machine that is busy with other tests."""
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path):
    subprocess.run([sys.executable, path], check=True, capture_output=True, timeout=HANGS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) < 100
