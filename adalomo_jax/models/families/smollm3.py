"""SmolLM3: every fourth layer has no rotary positions."""

from collections.abc import Mapping
from typing import Any

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.families.family import GGUF, Family
from adalomo_jax.models.families.layers import layer_types, windows_of


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    has_bias, layers = config.get("attention_bias", False), config.get("num_hidden_layers", 0)
    every = config.get("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers", [int((i + 1) % every != 0) for i in range(layers)])
    if len(rotated) < layers:
        raise ValueError(
            f"no_rope_layers must be of the {layers} layers of num_hidden_layers, got {len(rotated)} of them"
        )
    windows = {"sliding_window": None}
    if config.get("use_sliding_window", False):
        windows = windows_of(config, lambda i: not rotated[i])
    return {
        "rotated": tuple(map(bool, rotated[:layers])),
        "qkv_bias": has_bias,
        "o_bias": has_bias,
        "mlp_bias": config.get("mlp_bias", False),
    } | windows


def _fields(config: DecoderConfig) -> dict[str, Any]:
    rotated = config.rotated
    return {
        "no_rope_layers": [int(rotated[i % len(rotated)]) for i in range(config.num_hidden_layers)],
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
    }


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    _sizes,
    _fields,
    {"rope_theta": 2e6, "tie_word_embeddings": True},
    gguf=GGUF("smollm3", pairs_side_by_side=True),
)
