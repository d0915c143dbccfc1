"""The sizes of a Llama, under Hugging Face's field names, and those of well-known models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama; the field names are those of Hugging Face's ``config.json``."""

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

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_attention_heads} and {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even: rotary positions turn pairs, got {self.head_dim}.")


PRESETS: dict[str, LlamaConfig] = {
    "tiny": LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
    ),
    "smollm2-135m": LlamaConfig(
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
    "llama-2-7b": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "llama-2-13b": LlamaConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "llama-65b": LlamaConfig(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=22016,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=64,
        head_dim=128,
        max_position_embeddings=2048,
    ),
    "llama-3-8b": LlamaConfig(
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


def from_hugging_face(config: Mapping[str, Any]) -> LlamaConfig:
    """The sizes in the contents of a Hugging Face ``config.json`` of a Llama.

    Args:
        config: what the file holds, as a dictionary. ``num_key_value_heads``, ``head_dim`` and what has a default here
            may be missing, as in Hugging Face's own reader.

    Raises:
        ValueError: another architecture, rotary positions that are scaled, biases, or a size that is missing.

    Example:
        >>> sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
        >>> rest = dict(model_type="llama", vocab_size=256, max_position_embeddings=512)
        >>> from_hugging_face(sizes | rest).head_dim
        16
    """
    if config.get("model_type") != "llama":
        raise ValueError(f"model_type must be 'llama', got {config.get('model_type')!r}")
    for name, plain in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(name, plain) != plain:
            raise ValueError(f"{name} must be {plain!r}, got {config[name]!r}")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rotary positions must not be scaled, got rope scaling of the type {kind!r}")
    theta = {name: value for name, value in rope.items() if name == "rope_theta"}
    given = {name: value for name, value in config.items() if value is not None}
    found = {**_derived(config), **theta, **given}
    fields = dataclasses.fields(LlamaConfig)
    missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in found]
    if missing:
        raise ValueError(f"the sizes {', '.join(missing)} are missing")
    return LlamaConfig(**{field.name: found[field.name] for field in fields if field.name in found})


def _derived(config: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face's defaults of what other sizes give."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    derived = {"num_key_value_heads": heads, "head_dim": width // heads if heads and width else None}
    return {name: value for name, value in derived.items() if value is not None}
