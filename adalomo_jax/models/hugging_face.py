"""Converts Hugging Face's ``config.json`` to the sizes of a decoder, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from adalomo_jax.models.config import DecoderConfig, RopeScaling
from adalomo_jax.models.families import FAMILIES

_DEFAULTS = {"rms_norm_eps": 1e-6}
"""Hugging Face's defaults that differ from those of `DecoderConfig`."""


def from_hugging_face(config: Mapping[str, Any], place: str = "config.json") -> DecoderConfig:
    """The sizes in a Hugging Face ``config.json`` of a Llama, a Mistral or a Qwen2.

    Args:
        config: the file's contents, as a dictionary. ``num_key_value_heads``, ``head_dim`` and fields that have a
            default here may be missing, as in Hugging Face's own reader.
        place: where the contents are from, for messages.

    Raises:
        ValueError: the architecture is another one, rotary positions are scaled other than by ``linear`` or ``llama3``,
            the SwiGLU has biases, layers differ, a size is missing, or a value is of another type or out of its range;
            one line with the place, the field, the value and what is allowed.

    Example:
        >>> sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
        >>> rest = dict(model_type="llama", vocab_size=256, max_position_embeddings=512)
        >>> from_hugging_face(sizes | rest).head_dim
        16
    """
    from adalomo_jax.models.config_fields import ConfigFields  # needs pydantic, but a Llama does not
    from adalomo_jax.models.fields import check

    fields = check(ConfigFields, config, place)
    try:
        return _sizes(fields.model_dump(exclude_unset=True))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def to_hugging_face(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The contents of ``config.json``, for the first family that has such models; `from_hugging_face` reads them.

    Raises:
        ValueError: no family has both biases and a sliding window.
    """
    values = dataclasses.asdict(config)
    for name in ("qkv_bias", "o_bias", "sliding_window"):
        del values[name]
    described = [(family, family.fields(config)) for family in FAMILIES.values()]
    family, fields = next(((family, fields) for family, fields in described if fields is not None), (None, {}))
    if family is None:
        raise ValueError(
            f"no family of {', '.join(FAMILIES)} has qkv_bias={config.qkv_bias}, o_bias={config.o_bias} and "
            f"sliding_window={config.sliding_window} together."
        )
    if values["rope_scaling"] and config.rope_scaling and config.rope_scaling.rope_type == "linear":
        values["rope_scaling"] = {"rope_type": "linear", "factor": config.rope_scaling.factor}
    return values | {
        **fields,
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": dtype,
    }


def _sizes(config: Mapping[str, Any]) -> DecoderConfig:
    """The sizes in checked fields."""
    given = {name: value for name, value in config.items() if value is not None}
    of_family = FAMILIES[config["model_type"]].sizes(config)
    found = {**_DEFAULTS, **_derived(given), **given, **_rope(given), **of_family}
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


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary base and scaling, from the places where older and newer files keep them."""
    places = (config.get("rope_scaling", {}), config.get("rope_parameters", {}))
    rope = {name: value for place in places for name, value in place.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if "factor" in rope and not {"rope_type", "type"}.intersection(rope):
        raise ValueError("rope_scaling.rope_type is missing, which says what its factor means")
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if kind == "default":
        return theta | {"rope_scaling": None}
    if kind not in ("linear", "llama3"):
        from adalomo_jax.models.fields import shown

        raise ValueError(
            f"rotary positions may be scaled by 'linear' or 'llama3', got rope scaling of the type {shown(kind)}"
        )
    names = [field.name for field in dataclasses.fields(RopeScaling)][1:]
    missing = [name for name in (names if kind == "llama3" else ["factor"]) if name not in rope]
    if missing:
        raise ValueError(f"rope scaling of the type {kind!r} takes {', '.join(missing)} too")
    return theta | {"rope_scaling": RopeScaling(kind, **{name: rope[name] for name in names if name in rope})}
