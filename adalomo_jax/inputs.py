"""A user's input to the commands: the error if it cannot be used, and the options that several commands have."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from tyro.conf import arg

from adalomo_jax.printable import printable

AXES = ("data", "fsdp", "tensor")
"""The axes that a mesh may have."""


class InputError(Exception):
    """What the user gave cannot be used; the message is one line and says what to give instead.

    It may hold names of files and texts of libraries, so it is made printable here, for all callers.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


class Stopped(Exception):
    """A signal has ended the run, and everything is saved; the message is one line and says how to go on."""


def one_line(error: Exception) -> str:
    """The text of an error, as part of a sentence."""
    return " ".join(str(error).split()).rstrip(".")


def default(meaning: str, metavar: str | None = None) -> object:
    """The text that ``--help`` shows as the default, if the value would say nothing, and as the option's value."""
    return arg(help_behavior_hint=f"(default: {meaning})", metavar=metavar)


def mesh_sizes(text: str | None, option: str) -> dict[str, int]:
    """The sizes of a mesh by axis, from the text of an option; none if it is not given."""
    sizes: dict[str, int] = {}
    for part in text.split(",") if text else ():
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise InputError(
                f"{option} takes each of {', '.join(AXES)} once, as axis=size with a size of at least 1, got {part!r}"
            )
        sizes[axis] = int(size)
    return sizes


def batch_parts(sizes: Mapping[str, int]) -> int:
    """How many devices a mesh of these sizes spreads a batch over."""
    return sizes.get("data", 1) * sizes.get("fsdp", 1)


def check_preset(name: str, presets: list[str], or_file: str = "") -> None:
    """Raise InputError for a name that is no preset; the message offers the nearest one and the alternatives."""
    if name in presets:
        return
    close = difflib.get_close_matches(name, presets, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    raise InputError(f"unknown model {name!r}; {guess}presets: {', '.join(presets)}{or_file and f', {or_file}'}")
