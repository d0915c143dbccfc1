"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


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
