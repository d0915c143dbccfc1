"""Tensors in files: those of a Hugging Face folder, read one at a time, or a part of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from adalomo_jax.pretrained.json_files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class TensorSource(Protocol):
    """Tensors by Hugging Face's names, of which nothing is held in memory."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all tensors."""
        ...

    @property
    def dtype(self) -> str:
        """The type that holds every value exactly: float32, float16 or bfloat16."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, of any floating type."""
        ...


class SafetensorsSource:
    """The ``*.safetensors`` of a folder: a single one, or those that its index names."""

    def __init__(self, folder: Path):
        self._file_of: dict[str, Path] = {}
        self._types: set[str] = set()
        shapes: dict[str, tuple[int, ...]] = {}
        for path, expected in _files(folder).items():
            with _open(path) as file:
                names = set(file.keys())
                if expected is not None and not names.issuperset(expected):
                    lost = min(set(expected) - names)
                    raise ValueError(f"{path} must hold the tensor {lost}, which {INDEX} says is there: copy it again.")
                for name in names:
                    part = file.get_slice(name)
                    shapes[name], self._file_of[name] = tuple(part.get_shape()), path
                    self._types.add(_float_type(name, part.get_dtype(), path))
        self.shapes = MappingProxyType(shapes)

    @property
    def dtype(self) -> str:
        """The only one that there is, or float32."""
        return min(self._types) if len(self._types) == 1 and "float64" not in self._types else "float32"

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor. The file is mapped for so long only, that its pages do not count as memory in use."""
        with _open(self._file_of[name]) as file:
            return file.get_slice(name)[index] if index else file.get_tensor(name)


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """The files, with the names of the tensors that an index says they hold."""
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{folder / INDEX} must have a weight_map from tensors to files.")
        files = sorted(set(names.values()))
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which its {INDEX} names: download them.")
        return {folder / file: [name for name, of in names.items() if of == file] for file in files}
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}; other formats of weights are not read.")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): copy it again.") from None


def _float_type(name: str, dtype: str, path: Path) -> str:
    if dtype not in _FLOATS:
        raise ValueError(
            f"{name} in {path} must be one of {', '.join(_FLOATS)}, got {dtype}: quantized weights are not"
        )
    return _FLOATS[dtype]
