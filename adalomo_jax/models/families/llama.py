"""Llama: biases on all of the attention's matrices or on none, no sliding window."""

from collections.abc import Mapping
from typing import Any

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.families.family import GGUF, Family


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    has_bias = config.get("attention_bias", False)
    return {"qkv_bias": has_bias, "o_bias": has_bias, "mlp_bias": config.get("mlp_bias", False), "sliding_window": None}


def _fields(config: DecoderConfig) -> dict[str, Any]:
    return {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}


LLAMA = Family("llama", "LlamaForCausalLM", _sizes, _fields, gguf=GGUF("llama", pairs_side_by_side=True))
