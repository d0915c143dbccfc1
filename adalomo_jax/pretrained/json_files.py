"""Reads the JSON files of others' models, within bounds, and writes JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adalomo_jax.models.fields import plain
from adalomo_jax.pretrained.files import write_whole

MOST_BYTES = 1 << 26
"""No file that describes a model is larger: an index of 100,000 tensors has a sixth of this."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ValueError: the file is missing, unreadable, not a regular file, too large, or holds no JSON object.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} must be a regular file")
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path} must have at most {MOST_BYTES:,} bytes, got {path.stat().st_size:,}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {plain(error, 200)}") from None
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path} cannot be read: it is JSON with too many brackets inside each other") from None
    except ValueError as error:  # not JSON, or an integer of thousands of digits
        raise ValueError(f"{path} cannot be read: {plain(error, 200)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def read_json_if_there(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one if there is no file."""
    return read_json(path) if path.exists() else {}


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """Write an object, whole or not at all.

    It writes ASCII, as transformers does, so halves of surrogate pairs, which JSON may hold and UTF-8 not, work too.
    """
    text = json.dumps(contents, indent=2) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
