"""Qwen2 and Qwen3. Qwen2 has biases on queries, keys and values; Qwen3 norms over the heads of queries and keys.

In both, the layers from ``max_window_layers`` on may have a sliding window.
"""

from collections.abc import Mapping
from typing import Any

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.families.family import Family
from adalomo_jax.models.families.layers import layer_types, windows_of

_WINDOW = 4096
_FULL_LAYERS = 28
"""Hugging Face's defaults."""


def _windows(config: Mapping[str, Any]) -> dict[str, Any]:
    if not config.get("use_sliding_window", False):
        return {"sliding_window": None}
    first = config.get("max_window_layers", _FULL_LAYERS)
    return windows_of({"sliding_window": _WINDOW} | dict(config), lambda i: i >= first)


def _window_fields(config: DecoderConfig) -> dict[str, Any]:
    if config.sliding_window is None:
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
    }


def _qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True} | _windows(config)


def _qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    has_bias = config.get("attention_bias", False)
    return {"qk_norm": "head", "qkv_bias": has_bias, "o_bias": has_bias} | _windows(config)


def _qwen3_fields(config: DecoderConfig) -> dict[str, Any]:
    return {"attention_bias": config.o_bias} | _window_fields(config)


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _qwen2, _window_fields, gguf="qwen2")
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _qwen3, _qwen3_fields, {"head_dim": 128})
