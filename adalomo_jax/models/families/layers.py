"""Which layers have a sliding window, as ``config.json`` says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from adalomo_jax.models.config import DecoderConfig

_NAMES = {True: "sliding_attention", False: "full_attention"}


def windows_of(config: Mapping[str, Any], is_windowed: Callable[[int], bool]) -> dict[str, Any]:
    """``sliding_window`` and ``windowed`` of `DecoderConfig`, from ``layer_types``, or from a rule if there are none.

    Raises:
        ValueError: there are more or fewer types than layers.
    """
    layers, window = config.get("num_hidden_layers", 0), config.get("sliding_window")
    types = config.get("layer_types")
    if types is not None and len(types) != layers:
        raise ValueError(f"layer_types must be of the {layers} layers of num_hidden_layers, got {len(types)} of them")
    if types is not None:
        windowed = tuple(name == _NAMES[True] for name in types)
    else:
        windowed = tuple(bool(is_windowed(i)) for i in range(layers))
    if window is None or not any(windowed):
        return {"sliding_window": None, "windowed": (True,)}
    return {"sliding_window": window, "windowed": windowed}


def layer_types(config: DecoderConfig) -> list[str]:
    """``layer_types`` in ``config.json``."""
    has_window, windowed = config.sliding_window is not None, config.windowed
    return [_NAMES[has_window and windowed[i % len(windowed)]] for i in range(config.num_hidden_layers)]
