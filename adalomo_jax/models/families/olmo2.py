"""OLMo 2: norms after attention and MLP and none before them, norms over all heads of queries and keys."""

from collections.abc import Mapping
from typing import Any

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.families.family import GGUF, Family


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    has_bias = config.get("attention_bias", False)
    return {"norms": "after", "qk_norm": "all", "qkv_bias": has_bias, "o_bias": has_bias, "sliding_window": None}


def _fields(config: DecoderConfig) -> dict[str, Any]:
    return {"attention_bias": config.o_bias}


OLMO2 = Family("olmo2", "Olmo2ForCausalLM", _sizes, _fields, {"rms_norm_eps": 1e-5}, gguf=GGUF("olmo2"))
