"""Qwen2: biases on queries, keys and values, no sliding window."""

from collections.abc import Mapping
from typing import Any

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.families.family import Family


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("use_sliding_window", False):
        raise ValueError("use_sliding_window must be False: with it, a Qwen2's layers differ, got True")
    return {"qkv_bias": True, "sliding_window": None}


def _fields(config: DecoderConfig) -> dict[str, Any] | None:
    return {} if config.qkv_bias and not config.o_bias and not config.sliding_window else None


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _sizes, _fields, gguf="qwen2")
