"""How ``config.json`` describes mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adalomo_jax.models.config import DecoderConfig

_COEFFICIENT = 0.001
"""Hugging Face's default for all families."""


def experts_of(config: Mapping[str, Any], default: int) -> dict[str, Any]:
    """The fields of `DecoderConfig` about experts; ``default`` is how many there are if no entry says it.

    transformers reads their number by two names in all families, and adds the router's loss only if
    ``output_router_logits`` is true.
    """
    adds_loss = config.get("output_router_logits", False)
    return {
        "num_experts": config.get("num_experts", config.get("num_local_experts", default)),
        "num_experts_per_tok": config["num_experts_per_tok"],
        "router_aux_loss_coef": config.get("router_aux_loss_coef", _COEFFICIENT) if adds_loss else 0.0,
    }


def expert_fields(config: DecoderConfig, number: str) -> dict[str, Any]:
    """The entries of ``config.json`` for such a decoder."""
    adds_loss = config.router_aux_loss_coef != 0
    return {
        number: config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "output_router_logits": adds_loss,
        "router_aux_loss_coef": config.router_aux_loss_coef if adds_loss else _COEFFICIENT,
    }


def gguf_experts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``config.json`` about experts, from the metadata of llama.cpp's files."""
    return {"num_experts": metadata["experts"], "num_experts_per_tok": metadata["experts_used"]}
