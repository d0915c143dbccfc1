"""Rotary positions in ``config.json``: base and scaling, from the places where older and newer files keep them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adalomo_jax.models.config import RopeScaling

_TAKES = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
"""The entries that each type of scaling needs."""


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `DecoderConfig`: ``rope_scaling``, and ``rope_theta`` if it is given here.

    Raises:
        ValueError: positions are scaled in another way, or an entry is missing.
    """
    places = (config.get("rope_scaling", {}), config.get("rope_parameters", {}))
    rope = {name: value for place in places for name, value in place.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if "factor" in rope and not {"rope_type", "type"}.intersection(rope):
        raise ValueError("rope_scaling.rope_type is missing, which says what its factor means")
    given = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if kind == "default":
        return given | {"rope_scaling": None}
    kind = "longrope" if kind == "su" else kind
    if kind not in _TAKES:
        from adalomo_jax.models.fields import shown

        known = ", ".join(map(repr, _TAKES))
        raise ValueError(f"rotary positions may be scaled by {known}, got rope scaling of the type {shown(kind)}")
    if kind == "longrope":
        rope |= _longrope(rope, config)
    missing = [name for name in _TAKES[kind] if name not in rope]
    if missing:
        raise ValueError(f"rope scaling of the type {kind!r} takes {', '.join(missing)} too")
    taken = {name: _hashable(rope[name]) for name in _TAKES[kind]}
    factor = {"attention_factor": rope["attention_factor"]} if kind == "longrope" else {}
    return given | {"rope_scaling": RopeScaling(kind, **taken, **factor)}


def rope_entries(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """``rope_scaling`` in ``config.json``."""
    if scaling is None:
        return None
    entries = {name: getattr(scaling, name) for name in _TAKES[scaling.rope_type]}
    entries = {name: list(value) if isinstance(value, tuple) else value for name, value in entries.items()}
    factor = {"attention_factor": scaling.attention_factor} if scaling.rope_type == "longrope" else {}
    return {"rope_type": scaling.rope_type} | entries | factor


def _longrope(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from the other entries, as in transformers' ``modeling_rope_utils``."""
    most = config.get("max_position_embeddings")
    original = config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", most))
    if original is None or most is None:
        return {}
    factor = rope.get("factor", most / original)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return {"original_max_position_embeddings": original, "attention_factor": rope.get("attention_factor", attention)}


def _hashable(value: Any) -> Any:
    return tuple(map(float, value)) if isinstance(value, list | tuple) else value
