"""Writing of files whole or not at all, and checks that a file is a model's own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from adalomo_jax.models.fields import plain

_HASH = re.compile("[0-9a-f]{40}([0-9a-f]{24})?")
"""The name of a file in the ``blobs`` of Hugging Face's cache: the hash of its contents."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a file beside ``path`` and rename it; if it fails or is interrupted, nothing is left."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)  # safetensors lets the owner alone read its files
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def own_file(folder: Path, name: str) -> Path:
    """The regular file of that name in a model's folder, to be read or copied.

    A link may lead to a file in the folder, or to a blob of Hugging Face's cache (``models--*/blobs/<hash>``), since
    snapshots consist of such links. A folder from elsewhere might link to a file that its maker wants opened, or copied
    and published.

    Raises:
        ValueError: the file does not exist, is not a regular file, or is a link to another place.
    """
    path = folder / name
    shown = f"{folder}{os.sep}{plain(name)}"
    try:
        if not os.path.lexists(path):
            raise ValueError(f"{shown} cannot be read: there is no such file")
        if not path.is_file():
            kind = "links to no file" if path.is_symlink() and not path.exists() else "is none"
            raise ValueError(f"{shown} must be a regular file, and {kind}")
        real = path.resolve(strict=True)
        if not (real.is_relative_to(folder.resolve()) or _is_blob(real)):
            raise ValueError(
                f"{shown} must be in the folder itself, or link to a blob in Hugging Face's cache: it links elsewhere; "
                "copy the file that you want there"
            )
    except (OSError, RuntimeError) as error:  # no permission; a loop of links
        raise ValueError(f"{shown} cannot be read: {plain(error, 200)}") from None
    return path


def _is_blob(path: Path) -> bool:
    blobs = path.parent
    return blobs.name == "blobs" and blobs.parent.name.startswith("models--") and bool(_HASH.fullmatch(path.name))
