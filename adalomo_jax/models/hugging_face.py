"""Converts Hugging Face's ``config.json`` to the sizes of a decoder, and back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.families import FAMILIES, Family
from adalomo_jax.models.families.rope import rope_entries

_DEFAULTS = {"rms_norm_eps": 1e-6}
"""Hugging Face's defaults that differ from those of `DecoderConfig`."""
_NULLS = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
"""Fields whose null means that there is none. Any other null is as good as a missing field."""
_COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_theta",
    "rms_norm_eps",
    "tie_word_embeddings",
)
"""The fields that ``config.json`` and `DecoderConfig` share."""


def from_hugging_face(config: Mapping[str, Any], place: str = "config.json") -> DecoderConfig:
    """The sizes in a Hugging Face ``config.json`` of a family of `adalomo_jax.models.families`.

    A multimodal Gemma 3 is read as its text part, `text_config`.

    Args:
        config: the file's contents, as a dictionary. ``num_key_value_heads``, ``head_dim`` and fields that have a
            default here may be missing, as in Hugging Face's own reader.
        place: where the contents are from, for messages.

    Raises:
        ValueError: the architecture is another one, a field is not known, rotary positions are scaled in an unknown
            way, a size is missing, or a value is of another type or out of its range; one line with the place, the
            field, the value and what is allowed.

    Example:
        >>> sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
        >>> rest = dict(model_type="llama", vocab_size=256, max_position_embeddings=512)
        >>> from_hugging_face(sizes | rest).head_dim
        16
    """
    from adalomo_jax.models.config_fields import ConfigFields, check_known  # needs pydantic, but a Llama does not
    from adalomo_jax.models.fields import check

    config = text_config(config)
    fields = check(ConfigFields, config, place)
    check_known(config, place)
    try:
        return sizes_of(fields.model_dump(exclude_unset=True))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of ``config.json`` that describes the decoder: of a multimodal Gemma 3, the text part."""
    text = config.get("text_config")
    if config.get("model_type") != "gemma3" or not isinstance(text, Mapping):
        return config
    kept = {name: config[name] for name in ("torch_dtype", "dtype", "eos_token_id", "bos_token_id") if name in config}
    return kept | dict(text) | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}


def to_hugging_face(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The contents of ``config.json``, for the first family that has such models; `from_hugging_face` reads them.

    Raises:
        ValueError: no family has such models.
    """
    family = family_of(config)
    if family is not None:
        return _written(config, family, dtype)
    plain = DecoderConfig(**{name: getattr(config, name) for name in _COMMON})
    fields = [field.name for field in dataclasses.fields(config)]
    differing = [name for name in fields if getattr(config, name) != getattr(plain, name)]
    options = ", ".join(f"{name}={getattr(config, name)!r}" for name in differing)
    raise ValueError(f"no family of {', '.join(FAMILIES)} has models with {options} together.")


@functools.cache
def family_of(config: DecoderConfig) -> Family | None:
    """The first family that has such models; None if none has."""
    is_one = lambda family: _is_read_back(_written(config, family, "float32"), config)
    return next(filter(is_one, FAMILIES.values()), None)


def _written(config: DecoderConfig, family: Family, dtype: str) -> dict[str, Any]:
    common = {name: getattr(config, name) for name in _COMMON}
    return common | {
        "hidden_act": config.hidden_act,
        "rope_scaling": rope_entries(config.rope_scaling),
        **family.fields(config),
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,  # transformers' default may lie beyond the vocabulary
        "torch_dtype": dtype,
    }


def _is_read_back(contents: Mapping[str, Any], config: DecoderConfig) -> bool:
    try:
        return sizes_of(contents) == config
    except ValueError:
        return False


def sizes_of(config: Mapping[str, Any]) -> DecoderConfig:
    """The sizes in the checked entries of a ``config.json``."""
    family = FAMILIES[config["model_type"]]
    given = {name: value for name, value in config.items() if value is not None}
    nulls = {name: None for name in _NULLS if name in config and config[name] is None}
    entries = {**_DEFAULTS, **family.defaults, **_derived(given), **given, **nulls}
    # Other entries, which another family would read, mean nothing here, as in transformers.
    common = {name: entries[name] for name in (*_COMMON, "hidden_act") if name in entries}
    found = common | family.rope(entries) | family.sizes(entries)
    fields = dataclasses.fields(DecoderConfig)
    missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in found]
    if missing:
        raise ValueError(f"the sizes {', '.join(missing)} are missing")
    return DecoderConfig(**{field.name: found[field.name] for field in fields if field.name in found})


def _derived(config: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face's defaults for the sizes that follow from others."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if heads and width and heads > width and "head_dim" not in config:
        raise ValueError(
            f"num_attention_heads must be at most the {width} of hidden_size without a head_dim, got {heads}"
        )
    derived = {"num_key_value_heads": heads, "head_dim": width // heads if heads and width else None}
    return {name: value for name, value in derived.items() if value is not None}
