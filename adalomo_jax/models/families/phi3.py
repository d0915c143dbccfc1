"""Phi-3 and Phi-4: queries, keys and values in one matrix, gate and up in another; partial rotary positions."""

from collections.abc import Mapping
from typing import Any

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.families.family import GGUF, Family
from adalomo_jax.models.families.rope import rope_of


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"fused_projections": True, "sliding_window": config.get("sliding_window")}


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Older files call ``longrope`` by other names, and the positions of the first training may be left out."""
    scaling = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    for name in ("type", "rope_type"):
        if scaling.get(name) in ("su", "yarn"):
            scaling[name] = "longrope"
    flat = {name: value for name, value in config.items() if name != "rope_parameters"}
    share = {"partial_rotary_factor": 1.0, **config, **scaling}["partial_rotary_factor"]
    found = rope_of({"original_max_position_embeddings": 4096} | flat | {"rope_scaling": scaling})
    return found | {"partial_rotary_factor": share}


def _fields(config: DecoderConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    original = (
        None if scaling is None else {"original_max_position_embeddings": scaling.original_max_position_embeddings}
    )
    return {
        "sliding_window": config.sliding_window,
        "partial_rotary_factor": config.partial_rotary_factor,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        **(original or {}),
    }


def _gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    width = metadata["key_length"] or metadata["embedding_length"] // metadata["heads"]
    return {
        "sliding_window": metadata["window"] or None,
        "partial_rotary_factor": (metadata["rope_dim"] or width) / width,
    }


PHI3 = Family("phi3", "Phi3ForCausalLM", _sizes, _fields, {"rms_norm_eps": 1e-5}, _rope, gguf=GGUF("phi3", _gguf))
