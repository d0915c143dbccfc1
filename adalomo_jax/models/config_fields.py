"""The types and ranges of a model's sizes in ``config.json``. The bounds lie far above every known model."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from adalomo_jax.models.families import FAMILIES
from adalomo_jax.models.fields import Fields

Width = Annotated[int, Field(ge=1, le=1_000_000)]
"""The width of the residual stream, or of the SwiGLU layer."""
Layers = Annotated[int, Field(ge=1, le=10_000)]
Heads = Annotated[int, Field(ge=1, le=10_000)]
HeadDim = Annotated[int, Field(ge=2, le=10_000)]
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

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ValueError(f"have a low_freq_factor below its high_freq_factor of {high:g}")
        return self


def _known(family: str) -> str:
    if family not in FAMILIES:
        raise ValueError(f"be one of {', '.join(FAMILIES)}")
    return family


def _absent(is_there: bool) -> bool:
    if is_there:
        raise ValueError("be False")
    return is_there


class ConfigFields(Fields):
    """The fields read from ``config.json``. A null or missing field has its default, or follows from other sizes."""

    model_type: Annotated[str, AfterValidator(_known)]
    """Comes first because other models mean other things by the same names."""
    hidden_act: Literal["silu"] | None = None
    mlp_bias: Annotated[bool, AfterValidator(_absent)] | None = None
    vocab_size: Vocabulary | None = None
    hidden_size: Width | None = None
    intermediate_size: Width | None = None
    num_hidden_layers: Layers | None = None
    num_attention_heads: Heads | None = None
    num_key_value_heads: Heads | None = None
    head_dim: HeadDim | None = None
    max_position_embeddings: Positions | None = None
    rope_theta: Theta | None = None
    rms_norm_eps: Epsilon | None = None
    tie_word_embeddings: bool | None = None
    rope_scaling: RopeFields | None = None
    rope_parameters: RopeFields | None = None
    sliding_window: Positions | None = None
    use_sliding_window: bool | None = None
    attention_bias: bool | None = None
