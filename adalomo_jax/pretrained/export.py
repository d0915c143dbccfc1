"""Writes weights in Hugging Face's naming and layout, as a folder that transformers loads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from adalomo_jax.models import DecoderConfig, to_hugging_face
from adalomo_jax.optimizers.kept import Kept, floats, is_kept, take_layer
from adalomo_jax.pretrained.files import own_file, write_whole
from adalomo_jax.pretrained.json_files import write_json
from adalomo_jax.pretrained.names import Tensor, tensors_of
from adalomo_jax.pretrained.source import INDEX, SINGLE

SHARD_BYTES = 5 * 10**9
"""The most bytes in a file of weights."""

KEPT_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that a folder holds besides weights and sizes; they are copied unchanged."""
MOST_COPIED = 10**9
"""The most bytes in such a file: the largest known ones have about 0.04e9."""


def export_params(
    folder: Path,
    params: Any,
    config: DecoderConfig,
    *,
    fetch: Callable[[jax.Array], np.ndarray] = np.asarray,
    writes: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``model.safetensors``, or several files and their index, as `load_params` reads them.

    Memory holds the tensors of one file. A file is written whole or not at all; the index is written last.

    Args:
        folder: an existing folder.
        params: nested dictionary of a ``Decoder``'s parameters.
        config: its sizes.
        fetch: returns an array, whole, in this process's memory; all processes call it.
        writes: whether this process writes.
        shard_bytes: the most bytes in a file of more than one tensor.
    """
    files = list(_files(params, config, shard_bytes))
    names = (
        [SINGLE] if len(files) == 1 else [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    )
    for name, tensors in zip(names, files):
        contents = {tensor.name: _as_stored(fetch(_part(params, tensor)), tensor) for tensor in tensors}
        if writes:
            write_whole(folder / name, partial(save_file, contents, metadata={"format": "pt"}))
    if writes and len(files) > 1:
        places = {tensor.name: name for name, tensors in zip(names, files) for tensor in tensors}
        total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(floats, params)))
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def export_config(folder: Path, config: DecoderConfig, dtype: str, like: dict[str, Any] | None = None) -> None:
    """Write ``config.json``: ``like``, the trained checkpoint's, or a new one; with the type of the weights."""
    contents = to_hugging_face(config, dtype) if like is None else like
    key = "dtype" if "dtype" in contents else "torch_dtype"
    write_json(folder / "config.json", contents | {key: dtype})


def copy_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer and the other files that belong to a checkpoint.

    Raises:
        ValueError: see `check_kept_files`.
    """
    for file in check_kept_files(source):
        write_whole(folder / file.name, lambda path, file=file: shutil.copyfile(file, path))


def check_kept_files(folder: Path) -> list[Path]:
    """The files of `KEPT_FILES` that a folder has.

    Raises:
        ValueError: one is not a regular file of the folder (`own_file`), or has more than `MOST_COPIED` bytes.
    """
    files = [own_file(folder, name) for name in KEPT_FILES if os.path.lexists(folder / name)]
    for file in files:
        if (size := file.stat().st_size) > MOST_COPIED:
            raise ValueError(f"{file} must have at most {MOST_COPIED:,} bytes, got {size:,}")
    return files


def _files(params: Any, config: DecoderConfig, shard_bytes: int) -> Iterator[list[Tensor]]:
    """The tensors of each file."""
    held: list[Tensor] = []
    size = 0
    for tensor in tensors_of(config):
        nbytes = int(np.prod(tensor.shape)) * _leaf(params, tensor).dtype.itemsize
        if held and size + nbytes > shard_bytes:
            yield held
            held, size = [], 0
        held.append(tensor)
        size += nbytes
    yield held


def _leaf(params: Any, tensor: Tensor) -> Any:
    for name in tensor.path:
        params = params[name]
    return params


def _part(params: Any, tensor: Tensor) -> jax.Array:
    leaf = _leaf(params, tensor)
    return _floats_at(leaf, tensor.index) if is_kept(leaf) else leaf[tensor.index]


@jax.jit
def _floats_at(stack: Kept, index: tuple[int, ...]) -> jax.Array:
    for i in index:
        stack = take_layer(stack, partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False), 0)
    return stack.floats()


def _as_stored(value: np.ndarray, tensor: Tensor) -> np.ndarray:
    """The value in memory order: safetensors writes a view's memory as it is."""
    return np.ascontiguousarray(value.T if tensor.is_transposed else value)
