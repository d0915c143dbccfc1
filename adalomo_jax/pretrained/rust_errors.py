"""Turns errors of the library ``tokenizers``, which is written in Rust, into ``ValueError``s of one line."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from adalomo_jax.printable import printable

_SHOWN = 200


class Panic(ValueError):
    """The library's own code failed."""


@contextlib.contextmanager
def as_value_errors(what: str, *, quiet: bool = True) -> Iterator[None]:
    """Raise the library's errors as ``ValueError``s that start with ``what``.

    The library raises ``Exception`` itself. If its own code fails, it raises a ``PanicException``, which is no
    ``Exception``, after Rust has written tens of lines to standard error. Those lines are dropped; what other code
    writes there meanwhile comes after. ``ValueError``, ``TypeError`` and errors of other code pass unchanged.

    Args:
        what: the start of the message: which attempt failed.
        quiet: whether to hold back Rust's lines, which costs a tenth of a millisecond.
    """
    try:
        with _stderr_held() if quiet else contextlib.nullcontext():
            yield
    except BaseException as error:
        if _is_panic(error):
            raise Panic(f"{what}: {one_line(error)}") from None
        if type(error) in (Exception, OverflowError):
            raise ValueError(f"{what}: {one_line(error)}") from None
        raise


def one_line(error: BaseException | str) -> str:
    """An error's text, cut, and without terminal control characters."""
    return printable(" ".join(str(error)[: 10 * _SHOWN].split()) or type(error).__name__, _SHOWN)


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # the library does not export this class


@contextlib.contextmanager
def _stderr_held() -> Iterator[None]:
    """Hold back all code's writes to standard error until the end; after a panic, drop them."""
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(tempfile.TemporaryFile())
            stderr = os.dup(2)
            stack.callback(os.close, stderr)
            sys.stderr.flush()
            os.dup2(held.fileno(), 2)
        except (OSError, AttributeError, ValueError):  # no such stream, or no room for the file
            yield
            return
        try:
            yield
        except BaseException as error:
            os.dup2(stderr, 2)
            if not _is_panic(error):
                _replay(held, stderr)
            raise
        os.dup2(stderr, 2)
        _replay(held, stderr)


def _replay(held, stderr: int) -> None:
    held.seek(0)
    if content := held.read():
        with contextlib.suppress(OSError):
            os.write(stderr, content)
