"""The description of a family of models; each family has a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.families.rope import rope_of


class GGUF(NamedTuple):
    """How llama.cpp's files describe a family; what is not in a file, its source code says."""

    name: str
    """The architecture."""
    entries: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda metadata: {}
    """Takes the file's metadata, and returns the entries of ``config.json`` that not all families have."""
    pairs_side_by_side: bool = False
    """Whether both coordinates of a rotary pair of queries and keys are side by side."""
    has_experts: bool = False
    """Whether it is a mixture of experts; other models may have the same name."""
    added_to_norms: float = 0.0
    """What is added to the weights of norms in a file."""


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
    gguf: GGUF | None = None
    """How llama.cpp's files describe it; None if they use another family's name."""
