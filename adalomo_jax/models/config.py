"""The sizes of a decoder, under Hugging Face's field names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies for longer sequences than a model was first trained on; the names are Hugging Face's."""

    rope_type: Literal["linear", "llama3", "longrope"]
    """``linear`` divides all frequencies by the factor; ``llama3`` those of long waves, and partly those in between;
    ``longrope`` divides each frequency by a factor of its own."""
    factor: float = 1.0
    """The divisor of the frequencies."""
    low_freq_factor: float = 1.0
    """Waves longer than ``original_max_position_embeddings`` divided by this are long."""
    high_freq_factor: float = 4.0
    """Waves shorter than ``original_max_position_embeddings`` divided by this are short."""
    original_max_position_embeddings: int = 8192
    """Positions that the model was first trained on."""
    short_factor: tuple[float, ...] = ()
    """``longrope``: the divisor of each frequency for sequences of up to ``original_max_position_embeddings``."""
    long_factor: tuple[float, ...] = ()
    """``longrope``: the divisor of each frequency for longer sequences."""
    attention_factor: float = 1.0
    """``longrope``: the cosines and sines are multiplied by it."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a `Decoder`, and how it differs from a Llama.

    The field names are those of Hugging Face's ``config.json`` if all families mean the same by them.
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
    """How many positions a query sees, its own included, in layers that have a window. With None it sees all before
    it."""
    windowed: tuple[bool, ...] = (True,)
    """Which layers have the window: this is repeated over the layers. Gemma 2: every other one."""
    rotated: tuple[bool, ...] = (True,)
    """Which layers have rotary positions: this is repeated over the layers. SmolLM3: three of four."""
    local_rope_theta: float | None = None
    """Base of the rotary frequencies of layers with a window, which are not scaled: Gemma 3. None: as in the others."""
    partial_rotary_factor: float = 1.0
    """The share of a head's coordinates that rotary positions turn, the first ones: Phi-4-mini."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases: Qwen2."""
    o_bias: bool = False
    """Whether the attention's output has a bias."""
    mlp_bias: bool = False
    """Whether the three matrices after the attention have biases."""
    fused_projections: bool = False
    """Whether queries, keys and values are one matrix, and gate and up another: Phi-3."""
    qk_norm: Literal["head", "all"] | None = None
    """RMSNorm of queries and keys before they are turned: over each head (Qwen3, Gemma 3), or all heads (OLMo 2)."""
    attention_scale: float | None = None
    """The factor of the attention's scores; None is ``head_dim**-0.5``."""
    attention_softcap: float | None = None
    """Scores ``s`` become ``cap * tanh(s / cap)``: Gemma 2."""
    logits_softcap: float | None = None
    """Logits ``s`` become ``cap * tanh(s / cap)``: Gemma 2."""
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    """The activation of the gate: SiLU, or GELU by tanh (Gemma)."""
    norms: Literal["before", "after", "around"] = "before"
    """Whether attention and MLP have an RMSNorm before them, after them (OLMo 2), or both (Gemma)."""
    norm_offset: float = 0.0
    """Added to the weights of the stream's and the heads' norms: Gemma's is 1."""
    embedding_scale: float = 1.0
    """The factor of the embeddings, rounded to their type: Gemma, Granite."""
    residual_scale: float = 1.0
    """The factor of what attention and MLP add to the stream: Granite."""
    logits_divisor: float = 1.0
    """The divisor of the logits: Granite."""
    num_experts: int | None = None
    """How many gated MLPs a layer has, of which a router chooses some for each token: Mixtral, Qwen3-MoE. None: one
    MLP, for all tokens."""
    num_experts_per_tok: int = 1
    """How many experts each token passes through."""
    norm_topk_prob: bool = True
    """Whether the chosen experts' probabilities are divided by their sum."""
    router_aux_loss_coef: float = 0.0
    """The factor of the loss that balances the experts in training; see `next_token_loss`."""

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
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"partial_rotary_factor must be at most 1, and give an even part of the {self.head_dim} of head_dim, "
                f"got {self.partial_rotary_factor:g}."
            )
        self._check_experts()
        for name in ("windowed", "rotated"):
            object.__setattr__(self, name, _shortest_period(getattr(self, name)))
        self._check_longrope()

    @property
    def rotary_dim(self) -> int:
        """The number of a head's coordinates that rotary positions turn."""
        return int(self.head_dim * self.partial_rotary_factor)

    def _check_experts(self) -> None:
        experts, chosen = self.num_experts, self.num_experts_per_tok
        if experts is not None and chosen > experts:
            raise ValueError(f"num_experts_per_tok must be at most the {experts} of num_experts, got {chosen}.")
        if experts is None and (chosen != 1 or self.router_aux_loss_coef):
            raise ValueError("num_experts_per_tok and router_aux_loss_coef need num_experts, got None.")
        if experts is not None and (self.mlp_bias or self.fused_projections):
            raise ValueError("mlp_bias and fused_projections must be false with num_experts.")

    def _check_longrope(self) -> None:
        scaling, pairs = self.rope_scaling, self.rotary_dim // 2
        if scaling is not None and scaling.rope_type == "longrope":
            lengths = (len(scaling.short_factor), len(scaling.long_factor))
            if lengths != (pairs, pairs):
                raise ValueError(
                    f"short_factor and long_factor must have a number for each of the {pairs} rotary frequencies, "
                    f"got {lengths[0]} and {lengths[1]}."
                )


def _shortest_period(values: tuple[bool, ...]) -> tuple[bool, ...]:
    """The shortest beginning that gives all values if it is repeated."""
    if not values:
        raise ValueError("windowed and rotated must say it of at least one layer, got none.")
    repeats = lambda n: all(value == values[i % n] for i, value in enumerate(values))
    return values[: next(n for n in range(1, len(values) + 1) if repeats(n))]


def config_of(fields: Mapping[str, Any]) -> DecoderConfig:
    """The config from which ``dataclasses.asdict`` made these fields, perhaps by way of JSON."""
    fields = _with_tuples(fields)
    scaling = fields.get("rope_scaling")
    return DecoderConfig(
        **{**fields, "rope_scaling": None if scaling is None else RopeScaling(**_with_tuples(scaling))}
    )


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
