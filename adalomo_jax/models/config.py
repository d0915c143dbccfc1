"""The sizes of a decoder, under Hugging Face's field names, and the sizes of well-known models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies for longer sequences than a model was first trained on; the names are Hugging Face's."""

    rope_type: Literal["linear", "llama3"]
    """``linear`` divides all frequencies by the factor; ``llama3`` those of long waves, and partly those in between."""
    factor: float
    """The divisor of the frequencies."""
    low_freq_factor: float = 1.0
    """Waves longer than ``original_max_position_embeddings`` divided by this are long."""
    high_freq_factor: float = 4.0
    """Waves shorter than ``original_max_position_embeddings`` divided by this are short."""
    original_max_position_embeddings: int = 8192
    """Positions that the model was first trained on."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a `Decoder`: a Llama, or a Mistral or Qwen2, which differ in the last fields.

    The field names are those of Hugging Face's ``config.json``, except the biases, which each family names differently.
    """

    vocab_size: int
    """Number of tokens."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the SwiGLU layer."""
    num_hidden_layers: int
    """Number of blocks."""
    num_attention_heads: int
    """Number of query heads."""
    num_key_value_heads: int
    """Number of key and value heads; each serves ``num_attention_heads / num_key_value_heads`` query heads."""
    head_dim: int
    """Width of one head, even."""
    max_position_embeddings: int
    """Longest sequence, in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square before its root is taken."""
    tie_word_embeddings: bool = False
    """Whether the output head is the transposed embedding."""
    rope_scaling: RopeScaling | None = None
    """How the rotary frequencies are scaled: Llama 3.1 and later."""
    sliding_window: int | None = None
    """How many positions a query sees, its own included: Mistral. With None it sees all before it."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases: Qwen2."""
    o_bias: bool = False
    """Whether the attention's output has a bias."""

    def __post_init__(self):
        sizes = [field.name for field in dataclasses.fields(self) if field.type == "int"]
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_attention_heads} and {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even: rotary positions turn pairs, got {self.head_dim}.")


def config_of(fields: Mapping[str, Any]) -> DecoderConfig:
    """The config from which ``dataclasses.asdict`` made these fields, perhaps by way of JSON."""
    scaling = fields["rope_scaling"]
    return DecoderConfig(**{**fields, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})


PRESETS: dict[str, DecoderConfig] = {
    "tiny": DecoderConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
    ),
    "smollm2-135m": DecoderConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
    "llama-2-7b": DecoderConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "llama-2-13b": DecoderConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "llama-65b": DecoderConfig(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=22016,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=64,
        head_dim=128,
        max_position_embeddings=2048,
    ),
    "llama-3-8b": DecoderConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    ),
}
"""Models by name. ``tiny`` reads bytes; the others have the sizes, not the weights, of the published models."""
