"""Errors of the library ``tokenizers``, which is written in Rust, as ``ValueError`` of one line."""

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
    """Have what the library raises say ``what`` failed.

    It raises ``Exception`` itself, and where its own code fails a ``PanicException``, which is none; before that one,
    Rust writes tens of lines to the standard error. They are left out; what others write there meanwhile comes after.
    ``ValueError``, ``TypeError`` and all that is no error of the library's pass as they are.

    Args:
        what: of the message: what has been tried.
        quiet: whether to keep Rust's lines back, which costs a tenth of a millisecond.
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
    """What an error says, cut, and without what a terminal obeys."""
    return printable(" ".join(str(error)[: 10 * _SHOWN].split()) or type(error).__name__, _SHOWN)


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # which the library does not export


@contextlib.contextmanager
def _stderr_held() -> Iterator[None]:
    """What is written to the standard error by any code is written at the end, but for a panic not at all."""
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(tempfile.TemporaryFile())
            stderr = os.dup(2)
            stack.callback(os.close, stderr)
            sys.stderr.flush()
            os.dup2(held.fileno(), 2)
        except (OSError, AttributeError, ValueError):  # there is no such stream, or no room for the file
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
