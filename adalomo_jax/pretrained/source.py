"""The tensors in a Hugging Face folder, read one at a time or in parts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import AfterValidator, Field
from safetensors import SafetensorError, safe_open

from adalomo_jax.models.fields import Fields, check, plain
from adalomo_jax.pretrained.files import own_file
from adalomo_jax.pretrained.json_files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class TensorSource(Protocol):
    """Tensors by Hugging Face's names; none is held in memory."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of all tensors, by name."""
        ...

    @property
    def dtype(self) -> str:
        """The type that holds every value exactly: float32, float16 or bfloat16."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, of any floating type."""
        ...


class SafetensorsSource:
    """The weights in a folder: from ``model.safetensors``, or from the files that an index names, tensor by tensor.

    If a folder has both, the single file is read and the index is not, as in transformers' ``from_pretrained``
    (``modeling_utils._get_resolved_checkpoint_files``). If the index is read, each tensor comes from the file that the
    index names, whatever the other files hold. No file that the index does not name is opened.

    Raises:
        ValueError: the folder has neither; a file is broken, is not the folder's own (`own_file`), or lacks a tensor;
            or values are not floating-point numbers.
    """

    def __init__(self, folder: Path):
        self._file_of: dict[str, Path] = {}
        self._types: set[str] = set()
        shapes: dict[str, tuple[int, ...]] = {}
        for path, expected in _files(folder).items():
            with _open(path) as file:
                held = set(file.keys())
                for name in held if expected is None else expected:
                    if name not in held:
                        raise ValueError(
                            f"{path} must hold the tensor {plain(name)}, which {INDEX} says it holds: copy it again"
                        )
                    part = file.get_slice(name)
                    shapes[name], self._file_of[name] = tuple(part.get_shape()), path
                    self._types.add(_float_type(name, part.get_dtype(), path))
        self.shapes = MappingProxyType(shapes)

    @property
    def dtype(self) -> str:
        """The files' type if they have one only, and not float64; otherwise float32."""
        return min(self._types) if len(self._types) == 1 and "float64" not in self._types else "float32"

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor. The file is mapped only during the read, so its pages do not count as memory in use."""
        path = self._file_of[name]
        try:
            with _open(path) as file:
                return file.get_slice(name)[index] if index else file.get_tensor(name)
        except SafetensorError as error:  # the file is not the one that was opened first
            raise ValueError(f"{path} was changed while it was read ({plain(error)})") from None


class TextPart:
    """The language model's tensors of a multimodal checkpoint, under the names that they have in a model of text.

    Older files begin them with ``language_model.``, newer ones with ``model.language_model.``.
    """

    def __init__(self, whole: TensorSource):
        self._whole = whole
        names = {_name_in_text(name): name for name in whole.shapes}
        self._names = {ours: theirs for ours, theirs in names.items() if ours is not None}
        self.shapes = MappingProxyType({ours: whole.shapes[theirs] for ours, theirs in self._names.items()})

    @property
    def dtype(self) -> str:
        return self._whole.dtype

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._whole.read(self._names[name], index)


def _name_in_text(name: str) -> str | None:
    for theirs, ours in (("model.language_model.", "model."), ("language_model.", ""), ("lm_head.", "lm_head.")):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return None


def _plain_name(name: str) -> str:
    if name in (".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError("be the name of a file in the same folder, without a path")
    return name


class _Index(Fields):
    """``model.safetensors.index.json``."""

    weight_map: dict[str, Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_plain_name)]] = Field(
        min_length=1
    )


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """The files, each with the names of the tensors that the index says it holds."""
    if os.path.lexists(folder / SINGLE):
        return {own_file(folder, SINGLE): None}
    if not os.path.lexists(folder / INDEX):
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}; other formats of weights are not read.")
    index = own_file(folder, INDEX)
    tensors: dict[str, list[str]] = {}
    for tensor, file in check(_Index, read_json(index), str(index)).weight_map.items():
        tensors.setdefault(file, []).append(tensor)
    missing = [file for file in tensors if not os.path.lexists(folder / file)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{folder} lacks {plain(missing[0])}{more}, which its {INDEX} names: download the missing files"
        )
    return {own_file(folder, file): names for file, names in tensors.items()}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({plain(error, 100)}): copy it again.") from None


def _float_type(name: str, dtype: str, path: Path) -> str:
    if dtype not in _FLOATS:
        raise ValueError(
            f"{plain(name)} in {path} must be one of {', '.join(_FLOATS)}, got {dtype}: quantized weights are not read"
        )
    return _FLOATS[dtype]
