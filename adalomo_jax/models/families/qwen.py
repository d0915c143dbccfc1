"""Qwen2 and Qwen3. Qwen2 has biases on queries, keys and values; Qwen3 norms over the heads of queries and keys, and a
mixture of experts in each layer of some models.

In both, the layers from ``max_window_layers`` on may have a sliding window; with experts, all layers.
"""

from collections.abc import Mapping
from typing import Any

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.families.experts import expert_fields, experts_of, gguf_experts
from adalomo_jax.models.families.family import GGUF, Family
from adalomo_jax.models.families.layers import layer_types, windows_of

_WINDOW = 4096
_FULL_LAYERS = 28
_EXPERT_WIDTH = 768
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


def _qwen3_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise ValueError(
            "decoder_sparse_step must be 1 and mlp_only_layers empty, so that all layers have experts and share a stack"
        )
    of_experts = {
        "intermediate_size": config.get("moe_intermediate_size", _EXPERT_WIDTH),
        "norm_topk_prob": config.get("norm_topk_prob", False),
    }
    has_window = config.get("use_sliding_window", False)
    window = {"sliding_window": config.get("sliding_window", _WINDOW) if has_window else None, "windowed": (True,)}
    return _qwen3(config) | window | experts_of(config, 128) | of_experts


def _qwen3_moe_fields(config: DecoderConfig) -> dict[str, Any]:
    of_experts = {"moe_intermediate_size": config.intermediate_size, "norm_topk_prob": config.norm_topk_prob}
    no_other_layers = {"decoder_sparse_step": 1, "mlp_only_layers": []}
    window = {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    of_all = {"attention_bias": config.o_bias} | window
    return of_all | expert_fields(config, "num_experts") | of_experts | no_other_layers


def _gguf_entries(metadata: Mapping[str, Any]) -> dict[str, Any]:
    width = metadata["expert_feed_forward_length"] or metadata["feed_forward_length"]
    return gguf_experts(metadata) | {"moe_intermediate_size": width, "norm_topk_prob": True}


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _qwen2, _window_fields, gguf=GGUF("qwen2"))
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _qwen3, _qwen3_fields, {"head_dim": 128}, gguf=GGUF("qwen3"))
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _qwen3_moe,
    _qwen3_moe_fields,
    {"num_experts_per_tok": 8, "num_key_value_heads": 4},
    gguf=GGUF("qwen3moe", _gguf_entries, has_experts=True),
)
