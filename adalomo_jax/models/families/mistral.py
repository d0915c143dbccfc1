"""Mistral: a sliding window, no biases."""

from collections.abc import Mapping
from typing import Any

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.families.family import Family

_WINDOW = 4096
"""Hugging Face's default, if the file does not say ``null``."""


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": config.get("sliding_window", _WINDOW)}


def _fields(config: DecoderConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


MISTRAL = Family("mistral", "MistralForCausalLM", _sizes, _fields)
