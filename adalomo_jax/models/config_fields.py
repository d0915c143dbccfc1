"""The types and ranges of a model's sizes in ``config.json``. The bounds lie far above every known model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from adalomo_jax.models.families import FAMILIES
from adalomo_jax.models.fields import Fields, plain, shown

Width = Annotated[int, Field(ge=1, le=1_000_000)]
"""The width of the residual stream, or of the SwiGLU layer."""
Layers = Annotated[int, Field(ge=1, le=10_000)]
Heads = Annotated[int, Field(ge=1, le=10_000)]
HeadDim = Annotated[int, Field(ge=2, le=10_000)]
Experts = Annotated[int, Field(ge=1, le=10_000)]
Vocabulary = Annotated[int, Field(ge=1, le=100_000_000)]
Positions = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""Positions are counted in int32."""
Theta = Annotated[float, Field(ge=1, le=1e30)]
"""The frequencies are powers of it, from 0 to -1, in float32."""
Epsilon = Annotated[float, Field(ge=1e-30, le=1)]
"""Above 0 in float32 too: it keeps a row of zeros from giving 0 / 0."""
Factor = Annotated[float, Field(ge=1, le=1e6)]
"""Frequencies are divided by it, which draws positions closer."""
_Waves = Annotated[float, Field(gt=0, le=1e6)]
_Divisors = Annotated[list[Annotated[float, Field(gt=0, le=1e6)]], Field(min_length=1, max_length=5_000)]
Multiplier = Annotated[float, Field(gt=0, le=1e6)]
Share = Annotated[float, Field(gt=0, le=1)]


class RopeFields(Fields):
    """``rope_scaling`` and, in newer files, ``rope_parameters``."""

    rope_type: str | None = None
    type: str | None = None
    """The same in older files."""
    rope_theta: Theta | None = None
    factor: Factor | None = None
    low_freq_factor: _Waves | None = None
    high_freq_factor: _Waves | None = None
    original_max_position_embeddings: Positions | None = None
    short_factor: _Divisors | None = None
    long_factor: _Divisors | None = None
    attention_factor: Multiplier | None = None
    partial_rotary_factor: Share | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ValueError(f"have a low_freq_factor below its high_freq_factor of {high:g}")
        return self


class LayeredRopeFields(RopeFields):
    """``rope_parameters`` of models whose types of layers differ."""

    full_attention: RopeFields | None = None
    sliding_attention: RopeFields | None = None


def _known(family: str) -> str:
    if family not in FAMILIES:
        raise ValueError(f"be one of {', '.join(FAMILIES)}")
    return family


def _absent(value: float) -> float:
    if value:
        raise ValueError(f"be {type(value)()}")
    return value


Absent = Annotated[bool, AfterValidator(_absent)]
Zero = Annotated[float, AfterValidator(_absent)]
Act = Literal["silu", "gelu_pytorch_tanh"]
LayerType = Literal["full_attention", "sliding_attention"]


class ConfigFields(Fields):
    """The fields read from ``config.json``. A null or missing field has its default, or follows from other sizes."""

    model_type: Annotated[str, AfterValidator(_known)]
    """Comes first because other models mean other things by the same names."""
    hidden_act: Act | None = None
    hidden_activation: Act | None = None
    vocab_size: Vocabulary | None = None
    hidden_size: Width | None = None
    intermediate_size: Width | None = None
    num_hidden_layers: Layers | None = None
    num_attention_heads: Heads | None = None
    num_key_value_heads: Heads | None = None
    head_dim: HeadDim | None = None
    max_position_embeddings: Positions | None = None
    original_max_position_embeddings: Positions | None = None
    rope_theta: Theta | None = None
    rope_local_base_freq: Theta | None = None
    partial_rotary_factor: Share | None = None
    rms_norm_eps: Epsilon | None = None
    tie_word_embeddings: bool | None = None
    rope_scaling: RopeFields | None = None
    rope_parameters: LayeredRopeFields | None = None
    sliding_window: Positions | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Field(ge=0, le=10_000)] | None = None
    sliding_window_pattern: Layers | None = None
    internal_pattern: Layers | None = Field(None, alias="_sliding_window_pattern")
    """transformers writes the pattern by this name."""
    layer_types: list[LayerType] | None = None
    no_rope_layers: list[Annotated[int, Field(ge=0, le=1)]] | None = None
    no_rope_layer_interval: Layers | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    query_pre_attn_scalar: Annotated[float, Field(gt=0, le=1e9)] | None = None
    attn_logit_softcapping: Multiplier | None = None
    final_logit_softcapping: Multiplier | None = None
    attention_multiplier: Multiplier | None = None
    embedding_multiplier: Multiplier | None = None
    residual_multiplier: Multiplier | None = None
    logits_scaling: Multiplier | None = None
    num_experts: Experts | None = None
    num_local_experts: Experts | None = None
    num_experts_per_tok: Experts | None = None
    moe_intermediate_size: Width | None = None
    norm_topk_prob: bool | None = None
    output_router_logits: bool | None = None
    router_aux_loss_coef: Annotated[float, Field(ge=0, le=1e6)] | None = None
    decoder_sparse_step: Layers | None = None
    mlp_only_layers: list[Annotated[int, Field(ge=0, le=10_000)]] | None = None
    router_jitter_noise: Zero | None = None
    use_bidirectional_attention: Absent | None = None
    attention_dropout: Zero | None = None
    resid_pdrop: Zero | None = None
    embd_pdrop: Zero | None = None


_HARMLESS = frozenset(
    """
    architectures auto_map bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    torch_dtype dtype transformers_version use_cache initializer_range pretraining_tp cache_implementation name_or_path
    tokenizer_class chunk_size_feed_forward return_dict output_hidden_states output_attentions is_encoder_decoder
    is_decoder tie_encoder_decoder add_cross_attention cross_attention_hidden_size id2label label2id finetuning_task
    problem_type prefix task_specific_params torchscript pruned_heads use_bfloat16 tf_legacy_loss bad_words_ids
    begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    tokens rope_interleaved is_llama_config unsloth_fixed unsloth_version model_name transformers.js_config
    """.split()
)
"""Fields that change no number that a decoder computes: they are about generation, other tools, or other models."""


def check_known(config: Mapping[str, object], place: str) -> None:
    """Refuse a field that may change the numbers, and is not known.

    Raises:
        ValueError: there is one, and it is neither null nor false; the message names it.
    """
    known = {field.alias or name for name, field in ConfigFields.model_fields.items()} | _HARMLESS
    for name, value in config.items():
        if name not in known and not name.startswith("_") and value is not None and value is not False:
            raise ValueError(
                f"{place}: {plain(name)} is not known, got {shown(value)}: it may change what the model computes; "
                "remove it if it does not"
            )
