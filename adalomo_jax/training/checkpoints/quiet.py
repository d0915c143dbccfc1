"""Orbax without its own report of an error, which it also raises as an exception."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

_DROPPED = ("Event loop is closed", "Encountered error while reading array")
"""Errors of other reads and writes, which Orbax drops when one has failed (orbax-checkpoint 0.12.8)."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block in which Orbax reads or writes. Errors that it logs, or that its threads drop, are not printed.

    After an error it stays quiet: TensorStore's threads still work on what was dropped, and nobody can wait for them.
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
