"""Weights and sizes in the naming and layout of Hugging Face's Llama."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from adalomo_jax.finetune.files import write_whole
from adalomo_jax.models import LlamaConfig


def to_hugging_face(params: Any) -> dict[str, np.ndarray]:
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


def hugging_face_config(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The contents of ``config.json``."""
    return dataclasses.asdict(config) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": dtype,
        "tokens": "bytes: token i is the byte i of UTF-8 text",
    }


def export_model(folder: Path, params: Any, config: LlamaConfig, dtype: str) -> None:
    """Write ``model.safetensors`` and ``config.json``."""
    tensors = to_hugging_face(params)
    write_whole(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps(hugging_face_config(config, dtype), indent=2) + "\n"
    write_whole(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def _tensor(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Flax's ``kernel`` ``[in, out]`` is the transposed ``weight``; safetensors writes a view's memory as it lies."""
    module, kind = name.rsplit(".", 1)
    return f"{module}.weight", np.ascontiguousarray(value.T if kind == "kernel" else value)
