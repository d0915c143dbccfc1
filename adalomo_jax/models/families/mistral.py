"""Mistral: a sliding window, no biases. Mixtral: a mixture of experts in each layer."""

from collections.abc import Mapping
from typing import Any

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.families.experts import expert_fields, experts_of, gguf_experts
from adalomo_jax.models.families.family import GGUF, Family

_WINDOW = 4096
"""Hugging Face's default, if the file does not say ``null``."""


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": config.get("sliding_window", _WINDOW)}


def _fields(config: DecoderConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


def _mixtral(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": config.get("sliding_window")} | experts_of(config, 8)


def _mixtral_fields(config: DecoderConfig) -> dict[str, Any]:
    return _fields(config) | expert_fields(config, "num_local_experts")


MISTRAL = Family("mistral", "MistralForCausalLM", _sizes, _fields)
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _mixtral,
    _mixtral_fields,
    {
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
    gguf=GGUF("llama", gguf_experts, pairs_side_by_side=True, has_experts=True),
    tensors={
        "mlp": "block_sparse_moe",
        "gate_proj": "w1",
        "down_proj": "w2",
        "up_proj": "w3",
    },
)
