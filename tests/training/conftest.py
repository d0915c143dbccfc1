"""What runs of the training tests share: their programs, and a text."""

import pytest
from one_program import tiny_programs


@pytest.fixture(scope="module")
def small():
    """Runs of the tiny model compile a program once, and draw nothing."""
    with tiny_programs():
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"line {i} of a text that goes on\n" for i in range(200)))
    return path
