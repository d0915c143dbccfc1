"""Reads the header of a GGUF file: its metadata, and where its tensors lie.

``gguf.GGUFReader`` is not used, because it trusts the numbers in the file. It walks past the end of a file that claims
an array of 2**60 numbers, wraps offsets around, and takes 700 bytes for each item of an array. This module compares
each claim with the bytes that are left before it reads or allocates anything for it. The ``gguf`` package provides the
constants of the format, and reads the contents of tensors.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from adalomo_jax.models.fields import plain, shown

_VERSIONS = (2, 3)
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_ALIGNMENT = "general.alignment"
_MOST_FIELDS, _MOST_TENSORS = 10_000, 200_000
_MOST_ITEMS = 10_000_000
"""The most items of all arrays. The largest vocabularies have about 1,300,000: tokens, scores, types and merges."""
_MOST_NESTED = 4
"""Arrays nested in each other."""
_MOST_AXES = 4
_LEAST_FIELD, _LEAST_TENSOR = 13, 32
"""Bytes of the smallest ones: an empty name and a value of one byte; a name, an axis, a type and an offset."""


class TensorPlace(NamedTuple):
    """Where a whole tensor lies in the file."""

    offset: int
    """In bytes, from the file's start."""
    shape: tuple[int, ...]
    """In NumPy's order: the last axis is the one along which values lie side by side."""
    type: GGMLQuantizationType


class Header(NamedTuple):
    """The result of `read_header`."""

    fields: dict[str, Any]
    """Values by name: numbers, strings, booleans, and lists of them."""
    tensors: dict[str, TensorPlace]


def read_header(path: Path, is_wanted: Callable[[str], bool]) -> Header:
    """All tensors of a GGUF file, and the fields of its metadata whose names are wanted.

    Raises:
        ValueError: it is not a GGUF file, or claims more than it holds; the message is one line.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _header(_Cursor(data), is_wanted)
    except (OSError, ValueError, struct.error) as error:  # mmap refuses an empty file
        raise ValueError(f"{path} is no whole GGUF file ({plain(error, 200)}): copy it again.") from None


class _Cursor:
    """Reads bytes one after the other."""

    def __init__(self, data: mmap.mmap):
        self.data, self.size, self.at, self.items = data, len(data), 0, 0

    def expect(self, count: int, least: int, what: str) -> None:
        """Check that ``count`` items of at least ``least`` bytes each can come next."""
        if count * least > self.size - self.at:
            raise ValueError(f"it claims {count} {what}, but {self.size - self.at} bytes are left")

    def take(self, nbytes: int, what: str = "bytes") -> bytes:
        self.expect(nbytes, 1, what)
        self.at += nbytes
        return self.data[self.at - nbytes : self.at]

    def number(self, kind: str) -> int:
        """An unsigned integer of 4 bytes (``I``) or 8 (``Q``)."""
        (found,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))
        return found

    def string(self) -> bytes:
        return self.take(self.number("Q"), "bytes of a text")


def _header(cursor: _Cursor, is_wanted: Callable[[str], bool]) -> Header:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not start with GGUF")
    if (version := cursor.number("I")) not in _VERSIONS:
        order = ", in the other byte order" if version and version % 2**16 == 0 else ""
        raise ValueError(f"its version must be one of {', '.join(map(str, _VERSIONS))}, got {version}{order}")
    tensors, fields = cursor.number("Q"), cursor.number("Q")
    for count, most, least, what in (
        (fields, _MOST_FIELDS, _LEAST_FIELD, "fields"),
        (tensors, _MOST_TENSORS, _LEAST_TENSOR, "tensors"),
    ):
        cursor.expect(count, least, what)
        if count > most:
            raise ValueError(f"it must have at most {most:,} {what}, got {count:,}")
    found = _fields(cursor, fields, is_wanted)
    return Header(
        {name: value for name, value in found.items() if is_wanted(name)},
        _tensors(cursor, tensors, _alignment(found)),
    )


def _fields(cursor: _Cursor, count: int, is_wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The wanted fields and the alignment; of the other fields, only the names."""
    found: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.string().decode()
        if name in found:
            raise ValueError(f"the field {plain(name)} occurs twice")
        kind = GGUFValueType(cursor.number("I"))
        if name == _ALIGNMENT and kind != GGUFValueType.UINT32:
            raise ValueError(f"{_ALIGNMENT} must be of the type UINT32, got {kind.name}")
        found[name] = _value(cursor, kind, name == _ALIGNMENT or is_wanted(name))
    return found


def _value(cursor: _Cursor, kind: GGUFValueType, wanted: bool, depth: int = 0) -> Any:
    """The next value; None if it is not wanted."""
    if kind == GGUFValueType.STRING:
        text = cursor.string()
        return text.decode() if wanted else None
    if kind != GGUFValueType.ARRAY:
        return _numbers(cursor, kind, 1, wanted)[0]
    if depth == _MOST_NESTED:
        raise ValueError(f"arrays may be nested at most {_MOST_NESTED} deep")
    kind, count = GGUFValueType(cursor.number("I")), cursor.number("Q")
    is_scalar = kind in _SCALARS
    cursor.expect(count, np.dtype(_SCALARS[kind]).itemsize if is_scalar else 8, "items of an array")
    cursor.items += count
    if cursor.items > _MOST_ITEMS:
        raise ValueError(f"its arrays may have at most {_MOST_ITEMS:,} items, got {cursor.items:,}")
    if is_scalar:
        return _numbers(cursor, kind, count, wanted)
    values = []
    for _ in range(count):
        value = _value(cursor, kind, wanted, depth + 1)
        if wanted:
            values.append(value)
    return values


def _numbers(cursor: _Cursor, kind: GGUFValueType, count: int, wanted: bool) -> list[Any]:
    dtype = np.dtype(_SCALARS[kind])
    found = cursor.take(count * dtype.itemsize)
    return np.frombuffer(found, dtype).tolist() if wanted else [None]


def _alignment(fields: dict[str, Any]) -> int:
    alignment = fields.get(_ALIGNMENT, gguf.GGUF_DEFAULT_ALIGNMENT)
    if alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"{_ALIGNMENT} must be a power of 2 from 8 on, got {alignment}")
    return alignment


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorPlace]:
    """Where the tensors lie, each within the file and apart from the others."""
    claimed: dict[str, tuple[TensorPlace, int]] = {}
    for _ in range(count):
        name = cursor.string().decode()
        if name in claimed:
            raise ValueError(f"the tensor {plain(name)} occurs twice")
        try:
            claimed[name] = _tensor(cursor, alignment)
        except ValueError as error:
            raise ValueError(f"the tensor {plain(name)}: {error}") from None
    start = -(-cursor.at // alignment) * alignment
    end = 0
    for name, (place, nbytes) in sorted(claimed.items(), key=lambda item: item[1][0].offset):
        if start + place.offset + nbytes > cursor.size:
            raise ValueError(
                f"the tensor {plain(name)} must lie in the file of {cursor.size} bytes, but the header claims {nbytes} "
                f"bytes at {start + place.offset}"
            )
        if place.offset < end:
            raise ValueError(f"the tensor {plain(name)} overlaps another one")
        end = place.offset + nbytes
    return {name: place._replace(offset=start + place.offset) for name, (place, _) in claimed.items()}


def _tensor(cursor: _Cursor, alignment: int) -> tuple[TensorPlace, int]:
    """The next tensor, with the offset that the header claims, and its size in bytes."""
    if not 1 <= (axes := cursor.number("I")) <= _MOST_AXES:
        raise ValueError(f"it must have 1 to {_MOST_AXES} axes, got {axes}")
    shape = tuple(reversed([cursor.number("Q") for _ in range(axes)]))
    if min(shape) < 1:
        raise ValueError(f"its sizes must be at least 1, got {shown(list(shape))}")
    kind, offset = GGMLQuantizationType(cursor.number("I")), cursor.number("Q")
    values_in_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % values_in_block:
        raise ValueError(f"its rows must be of whole blocks of {values_in_block} ({kind.name}), got {shape[-1]}")
    if offset % alignment:
        raise ValueError(f"its offset must be a multiple of {alignment}, got {offset}")
    return TensorPlace(offset, shape, kind), math.prod(shape) // values_in_block * block_bytes
