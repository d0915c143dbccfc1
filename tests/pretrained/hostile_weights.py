"""Wrong claims that an index and safetensors may make, and values that are not finite."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hostile_configs import PLACED
from hostile_models import INDEX, SINGLE, Case, folder_with, tensors, weights
from safetensors.numpy import save


def index_cases() -> list[Case]:
    """Break a folder with two files and an index, which is otherwise right."""
    first = next(iter(tensors()))
    names = ["", ".", "..", "a/b", "../secret", "/etc/passwd", "a\\b", "a\0b", "a\nb", "x" * 300, "x" * 10**6]
    names += [5, None, True, ["a.safetensors"], {"a": 1}, 1.5, "missing.safetensors", "\ud800", "b.safetensors", "."]
    indices: dict[str, Any] = {
        "no map": {},
        "a list": [],
        "a map that is a list": {"weight_map": ["a"]},
        "a map that is null": {"weight_map": None},
        "an empty map": {"weight_map": {}},
        "deep": b'{"weight_map":' * 100_000,
        "half": json.dumps({"weight_map": _places()}).encode()[:-30],
        "an unknown tensor": {"weight_map": _places() | {"y" * 10**6: "a.safetensors"}},
        "a lost tensor": {"weight_map": {name: at for name, at in _places().items() if name != first}},
        "many lost files": {"weight_map": {f"t{i}": f"f{i}.safetensors" for i in range(20_000)}},
    }
    links = {f"a file that is {kind}": put for kind, put in PLACED.items()}
    return [
        Case("index right", _with_index({"weight_map": _places()}), True),
        *(Case(f"index to {name!r:.30}", _with_index({"weight_map": _places() | {first: name}})) for name in names),
        *(Case(f"index {name}", _with_index(value)) for name, value in indices.items()),
        *(Case(f"index to {name}", _with_index({"weight_map": _places()}, put)) for name, put in links.items()),
    ]


def _places() -> dict[str, str]:
    return {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(tensors())}


def _with_index(index: Any, put: Callable[[Path], object] | None = None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder_with(folder)
        (folder / SINGLE).unlink()
        for file in ("a.safetensors", "b.safetensors"):
            held = {name: tensors()[name] for name, at in _places().items() if at == file}
            (folder / file).write_bytes(save(held))
        (folder / INDEX).write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
        if put is not None:
            (folder / "b.safetensors").unlink()
            put(folder / "b.safetensors")
        return folder

    return write


def safetensors_cases() -> list[Case]:
    """Headers with false claims, and files that end early."""
    whole = weights()
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    first = next(iter(tensors()))
    at = header[first]["data_offsets"]
    changes: dict[str, Any] = {
        "offsets past the end": {first: header[first] | {"data_offsets": [at[0], at[1] + 10**9]}},
        "offsets of 2**64": {first: header[first] | {"data_offsets": [2**64 - 8, 2**64]}},
        "negative offsets": {first: header[first] | {"data_offsets": [-8, at[1]]}},
        "offsets turned": {first: header[first] | {"data_offsets": at[::-1]}},
        "a larger shape": {first: header[first] | {"shape": [10**9, 10**9]}},
        "a shape of 100,000 axes": {first: header[first] | {"shape": [1] * 100_000 + header[first]["shape"]}},
        "another type": {first: header[first] | {"dtype": "I32"}},
        "an unknown type": {first: header[first] | {"dtype": "F1"}},
        "no type": {first: {"shape": [1], "data_offsets": at}},
        "a list": {first: [1]},
        "a name of 1 MB": {"z" * 10**6: header[first], first: None},
        "a name that obeys": {"\x1b[2J\nx": header[first], first: None},
        "the shape of a vector": {first: header[first] | {"shape": [int(np.prod(header[first]["shape"]))]}},
    }
    claims = (0, 1, length - 1, length + 1, len(whole), 2**31, 2**62, 2**64 - 1)
    return [
        *(Case(f"weights with {name}", _with_header(header | change, data)) for name, change in changes.items()),
        *(Case(f"a header of {n} bytes", with_weights(struct.pack("<Q", n) + whole[8:])) for n in claims),
        *(Case(f"the first {n} bytes", with_weights(whole[:n])) for n in range(0, len(whole), len(whole) // 40)),
        *(
            Case(f"weights {name}", with_weights(b))
            for name, b in {"GGUF": b"GGUF" * 99, "a pickle": b"\x80\x04."}.items()
        ),
        Case("a header that is deep", with_weights(struct.pack("<Q", 100_000) + b"[" * 100_000)),
    ]


def finite_cases() -> list[Case]:
    """Put one value that is not finite into one tensor."""
    return [
        Case(f"{value} in {name}", _with_value(name, value))
        for name in tensors()
        for value in (float("nan"), float("inf"), -float("inf"))
    ]


def with_weights(weight_bytes: bytes) -> Callable[[Path], Path]:
    return lambda folder: folder_with(folder, weight_bytes=weight_bytes)


def _with_header(header: dict[str, Any], data: bytes) -> Callable[[Path], Path]:
    text = json.dumps({name: value for name, value in header.items() if value is not None}).encode()
    return with_weights(struct.pack("<Q", len(text)) + text + data)


def _with_value(name: str, value: float) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        changed = tensors()[name].copy()
        changed.flat[changed.size // 2] = value
        return folder_with(folder, weight_bytes=save(tensors() | {name: changed}))

    return write
