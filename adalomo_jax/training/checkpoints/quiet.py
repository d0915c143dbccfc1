"""Orbax without its own report of an error, which comes back as an exception besides."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

_DROPPED = ("Event loop is closed", "Encountered error while reading array")
"""Of Orbax's other reads and writes, which it drops when one has failed (orbax-checkpoint 0.12.8)."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block in which Orbax reads or writes: what it logs of errors, and what its threads drop, is not printed.

    Left by an error it stays quiet: threads of TensorStore, for which nobody can wait, are still at what was dropped.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    if not (isinstance(hook, partial) and hook.func is _told):
        sys.unraisablehook = partial(_told, hook)
    yield
    sys.unraisablehook = hook
    logger.setLevel(level)


def _told(hook: Any, unraisable: Any) -> None:
    if not str(unraisable.exc_value).startswith(_DROPPED):
        hook(unraisable)
