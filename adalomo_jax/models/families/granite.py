"""Granite 3: a Llama with multipliers of embeddings, scores, residuals and logits."""

from collections.abc import Mapping
from typing import Any

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.families.family import GGUF, Family


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    has_bias = config.get("attention_bias", False)
    return {
        "qkv_bias": has_bias,
        "o_bias": has_bias,
        "mlp_bias": config.get("mlp_bias", False),
        "sliding_window": None,
        "embedding_scale": config.get("embedding_multiplier", 1.0),
        "attention_scale": config.get("attention_multiplier", 1.0),
        "residual_scale": config.get("residual_multiplier", 1.0),
        "logits_divisor": config.get("logits_scaling", 1.0),
    }


def _fields(config: DecoderConfig) -> dict[str, Any]:
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return {
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": config.embedding_scale,
        "attention_multiplier": scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": config.logits_divisor,
    }


def _gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = ("embedding", "attention", "residual")
    multipliers = {f"{name}_multiplier": metadata[f"{name}_scale"] for name in names}
    return {name: value for name, value in multipliers.items() if value} | {"logits_scaling": metadata["logits_scale"]}


GRANITE = Family("granite", "GraniteForCausalLM", _sizes, _fields, gguf=GGUF("granite", _gguf, pairs_side_by_side=True))
