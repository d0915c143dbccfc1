"""Gemma 2 and Gemma 3: norms before and after, GELU, scaled embeddings, layers with and without a sliding window.

Gemma 2 caps scores and logits. Gemma 3 has norms over the heads of queries and keys instead, and another rotary base in
the layers with a window.
"""

import math
from collections.abc import Mapping
from typing import Any

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.families.family import GGUF, Family
from adalomo_jax.models.families.layers import layer_types, windows_of
from adalomo_jax.models.families.rope import rope_entries, rope_of

_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}
"""transformers' defaults. The files of Gemma 3 leave out what has its default."""


def _common(config: Mapping[str, Any]) -> dict[str, Any]:
    has_bias = config.get("attention_bias", False)
    return {
        "norms": "around",
        "norm_offset": 1.0,
        "embedding_scale": math.sqrt(config["hidden_size"]),
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
        "hidden_act": config["hidden_activation"],
        "qkv_bias": has_bias,
        "o_bias": has_bias,
        "attention_softcap": config.get("attn_logit_softcapping"),
        "logits_softcap": config.get("final_logit_softcapping"),
    }


def _gemma2(config: Mapping[str, Any]) -> dict[str, Any]:
    return _common(config) | windows_of(config, lambda i: i % 2 == 0)


def _gemma3(config: Mapping[str, Any]) -> dict[str, Any]:
    every = config.get("sliding_window_pattern", config.get("internal_pattern", 6))
    no_cap = {"attention_softcap": None}  # transformers has the entry, and does not use it
    return _common(config) | no_cap | {"qk_norm": "head"} | windows_of(config, lambda i: (i + 1) % every != 0)


def _gemma3_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The base of layers with a window is an entry of its own, or all of it is nested by the types of layers."""
    nested = config.get("rope_parameters") or {}
    of_global = nested.get("full_attention") or {}
    of_local = nested.get("sliding_attention") or {}
    kind = of_local.get("rope_type") or "default"
    if kind != "default":
        raise ValueError(f"rope_parameters.sliding_attention must be of the type 'default', got {kind!r}")
    flat = {name: value for name, value in config.items() if name != "rope_parameters"}
    found = rope_of(flat | {"rope_parameters": of_global})
    return found | {"local_rope_theta": of_local.get("rope_theta") or config.get("rope_local_base_freq", 10000.0)}


def _fields(config: DecoderConfig) -> dict[str, Any]:
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return {
        "hidden_activation": config.hidden_act,
        "query_pre_attn_scalar": round(scale**-2),
        "attention_bias": config.o_bias,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logits_softcap,
        "sliding_window": config.sliding_window or _DEFAULTS["sliding_window"],  # transformers wants a number
        "layer_types": layer_types(config),
    }


def _gemma3_fields(config: DecoderConfig) -> dict[str, Any]:
    whole = (rope_entries(config.rope_scaling) or {"rope_type": "default"}) | {"rope_theta": config.rope_theta}
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    return _fields(config) | {
        "rope_scaling": None,
        "rope_parameters": {"full_attention": whole, "sliding_attention": local},
    }


def _scalar(metadata: Mapping[str, Any], largest: int) -> dict[str, Any]:
    """llama.cpp scales scores by the width of a head, except in the 27B model, which it knows by its layers."""
    heads, width = metadata["heads"], metadata["embedding_length"]
    is_largest = metadata["block_count"] == largest
    return {"query_pre_attn_scalar": width / heads if is_largest else metadata["key_length"] or width // heads}


def _gguf2(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return _scalar(metadata, 46) | {
        "attn_logit_softcapping": metadata["attention_softcap"] or 50.0,
        "final_logit_softcapping": metadata["logits_softcap"] or 30.0,
        "sliding_window": metadata["window"] or None,
    }


def _gguf3(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return _scalar(metadata, 62) | {
        "final_logit_softcapping": metadata["logits_softcap"],
        "sliding_window": metadata["window"] or None,
        "rope_local_base_freq": metadata["local_rope_base"],
    }


GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    _gemma2,
    _fields,
    _DEFAULTS
    | {
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    gguf=GGUF("gemma2", _gguf2, added_to_norms=1.0),
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _gemma3,
    _gemma3_fields,
    _DEFAULTS | {"vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6},
    _gemma3_rope,
    gguf=GGUF("gemma3", _gguf3, added_to_norms=1.0),
)
