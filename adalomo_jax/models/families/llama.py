"""Llama: biases on all of the attention's matrices or on none, no sliding window."""

from collections.abc import Mapping
from typing import Any

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.families.family import Family


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    has_bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": has_bias, "o_bias": has_bias, "sliding_window": None}


def _fields(config: DecoderConfig) -> dict[str, Any] | None:
    if config.sliding_window or config.qkv_bias != config.o_bias:
        return None
    return {"attention_bias": config.o_bias, "mlp_bias": False}


LLAMA = Family("llama", "LlamaForCausalLM", _sizes, _fields, gguf="llama", pairs_side_by_side=True)
