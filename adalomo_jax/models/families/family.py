"""The description of a family of models; each family has a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.families.rope import rope_of


class Family(NamedTuple):
    """A family of models, described by its differences from the others."""

    model_type: str
    """Its name in ``config.json``."""
    architecture: str
    """Its class in Hugging Face's transformers."""
    sizes: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Takes this family's ``config.json``, with the defaults and without nulls that mean them, and returns the fields
    of `DecoderConfig` that only the family can tell from it; ``ValueError`` if it describes no `Decoder`."""
    fields: Callable[[DecoderConfig], dict[str, Any]]
    """The entries of ``config.json`` for such a decoder that not all families have. They need not describe a decoder
    that is none of this family: what is written is read back, and compared."""
    defaults: Mapping[str, Any] = {}
    """What transformers takes for entries that are missing, if it differs from `DecoderConfig`."""
    rope: Callable[[Mapping[str, Any]], dict[str, Any]] = rope_of
    """Takes ``config.json``, and returns the fields of `DecoderConfig` about rotary positions."""
    tensors: Mapping[str, str] = {}
    """What its checkpoints call modules that have another name in a Llama's."""
    gguf: str | None = None
    """Its name in llama.cpp's files; None if they use another family's name."""
    pairs_side_by_side: bool = False
    """Whether llama.cpp's files keep both coordinates of a rotary pair side by side."""
