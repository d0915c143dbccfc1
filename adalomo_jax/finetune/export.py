"""Weights and sizes in the naming and layout of Hugging Face's Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from adalomo_jax.finetune.files import write_whole
from adalomo_jax.models import LlamaConfig, to_hugging_face


def hugging_face_tensors(params: Any) -> dict[str, np.ndarray]:
    """The model's parameters by their Hugging Face names: layers apart, matrices ``[out, in]``.

    Args:
        params: nested dictionary of a ``Llama``'s parameters.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, value = jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(leaf)
        if name.startswith("layers."):
            for i, layer in enumerate(value):
                tensors |= [_tensor(f"model.layers.{i}.{name.removeprefix('layers.')}", layer)]
        else:
            tensors |= [_tensor(name if name.startswith("lm_head.") else f"model.{name}", value)]
    return tensors


def export_model(folder: Path, params: Any, config: LlamaConfig, dtype: str) -> None:
    """Write ``model.safetensors`` and ``config.json``."""
    tensors = hugging_face_tensors(params)
    write_whole(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    sizes = to_hugging_face(config, dtype) | {"tokens": "bytes: token i is the byte i of UTF-8 text"}
    text = json.dumps(sizes, indent=2) + "\n"
    write_whole(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def _tensor(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Flax's ``kernel`` ``[in, out]`` is the transposed ``weight``; safetensors writes a view's memory as it lies."""
    module, kind = name.rsplit(".", 1)
    return f"{module}.weight", np.ascontiguousarray(value.T if kind == "kernel" else value)
