"""Orbax's own report of an error is not printed; all else is silenced at most while Orbax reads or writes."""

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from adalomo_jax.training.checkpoints.quiet import quiet


@pytest.fixture
def printed(monkeypatch):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    level = logging.getLogger("absl").level
    yield said
    logging.getLogger("absl").setLevel(level)


def drop(message):
    dropped: Any = SimpleNamespace(exc_value=RuntimeError(message))
    sys.unraisablehook(dropped)
    return dropped


def test_what_orbax_drops_is_not_printed_and_all_else_is(printed):
    with quiet():
        drop("Event loop is closed")
        other = drop("other")
    assert printed == [other]


def test_it_ends_with_its_block(printed):
    before = sys.unraisablehook, logging.getLogger("absl").level
    with quiet():
        assert logging.getLogger("absl").level == logging.CRITICAL
    assert (sys.unraisablehook, logging.getLogger("absl").level) == before
    assert printed == [drop("Event loop is closed")]


def test_after_an_error_it_goes_on_for_those_threads_that_do(printed):
    for _ in range(3):
        with pytest.raises(ValueError), quiet():
            raise ValueError
    drop("Event loop is closed")
    assert printed == [] and sys.unraisablehook.args == (printed.append,)
    assert drop("other") in printed
