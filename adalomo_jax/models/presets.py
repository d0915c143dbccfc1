"""The sizes of well-known models, as their ``config.json`` on the hub has them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from adalomo_jax.models.config import DecoderConfig, RopeScaling


def _of(
    vocabulary: int, width: int, mlp: int, layers: int, heads: tuple[int, int, int], positions: int, **options: Any
):
    """A model with ``heads``: queries' heads, keys' heads, and their width."""
    return DecoderConfig(vocabulary, width, mlp, layers, *heads, positions, **options)


def _llama3(factor: float) -> dict[str, Any]:
    return {"rope_theta": 500000.0, "rope_scaling": RopeScaling("llama3", factor, 1.0, 4.0, 8192)}


def _qwen3(width: int, mlp: int, layers: int, query_heads: int, *, tied: bool) -> DecoderConfig:
    options: dict[str, Any] = dict(qk_norm="head", rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=tied)
    return _of(151936, width, mlp, layers, (query_heads, 8, 128), 40960, **options)


def _gemma(width: int, scale: float, **options: Any) -> dict[str, Any]:
    of_all = {
        "norms": "around",
        "norm_offset": 1.0,
        "hidden_act": "gelu_pytorch_tanh",
        "embedding_scale": math.sqrt(width),
        "attention_scale": scale**-0.5,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    return of_all | options


def _gemma2(width: int, mlp: int, layers: int, heads: tuple[int, int, int]) -> DecoderConfig:
    caps = {"attention_softcap": 50.0, "logits_softcap": 30.0}
    options = _gemma(width, 256, sliding_window=4096, windowed=(True, False), **caps)
    return _of(256000, width, mlp, layers, heads, 8192, **options)


def _gemma3(
    vocabulary: int,
    width: int,
    mlp: int,
    layers: int,
    heads: tuple[int, int, int],
    *,
    positions: int = 131072,
    window: int = 1024,
    scale: float = 256,
    factor: float | None = 8.0,
) -> DecoderConfig:
    windows = {"sliding_window": window, "windowed": (True,) * 5 + (False,), "local_rope_theta": 10000.0}
    scaling = None if factor is None else RopeScaling("linear", factor)
    options = _gemma(width, scale, qk_norm="head", rope_theta=1e6, rope_scaling=scaling, **windows)
    return _of(vocabulary, width, mlp, layers, heads, positions, **options)


_GRANITE = {"embedding_scale": 12.0, "attention_scale": 0.0078125, "residual_scale": 0.22, "logits_divisor": 16.0}
_PHI_4_MINI = {"fused_projections": True, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}

PRESETS: dict[str, DecoderConfig] = {
    "tiny": _of(256, 128, 384, 4, (4, 2, 32), 512),
    "smollm2-135m": _of(49152, 576, 1536, 30, (9, 3, 64), 8192, rope_theta=100000.0, tie_word_embeddings=True),
    "smollm3-3b": _of(
        *(128256, 2048, 11008, 36, (16, 4, 128), 65536),
        **dict(rotated=(True, True, True, False), rope_theta=5e6, rms_norm_eps=1e-6, tie_word_embeddings=True),
    ),
    "llama-2-7b": _of(32000, 4096, 11008, 32, (32, 32, 128), 4096),
    "llama-2-13b": _of(32000, 5120, 13824, 40, (40, 40, 128), 4096),
    "llama-65b": _of(32000, 8192, 22016, 80, (64, 64, 128), 2048),
    "llama-3-8b": _of(128256, 4096, 14336, 32, (32, 8, 128), 8192, rope_theta=500000.0),
    "llama-3.1-8b": _of(128256, 4096, 14336, 32, (32, 8, 128), 131072, **_llama3(8.0)),
    "llama-3.1-70b": _of(128256, 8192, 28672, 80, (64, 8, 128), 131072, **_llama3(8.0)),
    "llama-3.2-1b": _of(128256, 2048, 8192, 16, (32, 8, 64), 131072, **_llama3(32.0), tie_word_embeddings=True),
    "llama-3.2-3b": _of(128256, 3072, 8192, 28, (24, 8, 128), 131072, **_llama3(32.0), tie_word_embeddings=True),
    "mistral-7b": _of(32768, 4096, 14336, 32, (32, 8, 128), 32768, rope_theta=1e6),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, tied=False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, tied=False),
    "qwen3-30b-a3b": dataclasses.replace(
        _qwen3(2048, 768, 48, 32, tied=False), num_key_value_heads=4, num_experts=128, num_experts_per_tok=8
    ),
    "mixtral-8x7b": _of(
        *(32000, 4096, 14336, 32, (32, 8, 128), 32768), rope_theta=1e6, num_experts=8, num_experts_per_tok=2
    ),
    "gemma-2-2b": _gemma2(2304, 9216, 26, (8, 4, 256)),
    "gemma-2-9b": _gemma2(3584, 14336, 42, (16, 8, 256)),
    "gemma-3-1b": _gemma3(262144, 1152, 6912, 26, (4, 1, 256), positions=32768, window=512, factor=None),
    "gemma-3-4b": _gemma3(262208, 2560, 10240, 34, (8, 4, 256)),
    "gemma-3-12b": _gemma3(262208, 3840, 15360, 48, (16, 8, 256)),
    "gemma-3-27b": _gemma3(262208, 5376, 21504, 62, (32, 16, 128), scale=168),
    # Without its longrope, whose 96 divisors change neither memory nor time.
    "phi-4-mini": _of(200064, 3072, 8192, 32, (24, 8, 128), 131072, **_PHI_4_MINI),
    "phi-4": _of(100352, 5120, 17920, 40, (40, 10, 128), 16384, fused_projections=True, rope_theta=250000.0),
    "olmo-2-7b": _of(
        *(100352, 4096, 11008, 32, (32, 32, 128), 4096),
        **dict(norms="after", qk_norm="all", rope_theta=500000.0, rms_norm_eps=1e-6),
    ),
    "granite-3-8b": _of(49155, 4096, 12800, 40, (32, 8, 128), 4096, **_GRANITE, tie_word_embeddings=True),
}
"""Models by name. ``tiny`` reads bytes; the others have the sizes, not the weights, of the published models."""
