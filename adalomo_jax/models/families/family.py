"""The description of a family of models; each family has a module."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from adalomo_jax.models.config import DecoderConfig


class Family(NamedTuple):
    """A family of models, described by its differences from the others."""

    model_type: str
    """Its name in ``config.json``."""
    architecture: str
    """Its class in Hugging Face's transformers."""
    sizes: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Takes this family's ``config.json`` and returns the fields of `DecoderConfig` that only the family can tell from
    it; ``ValueError`` if it describes no `Decoder`."""
    fields: Callable[[DecoderConfig], dict[str, Any] | None]
    """The entries of this family's ``config.json`` for a config; None if no model of the family is such a decoder."""
    gguf: str | None = None
    """Its name in llama.cpp's files; None if they use another family's name."""
    pairs_side_by_side: bool = False
    """Whether llama.cpp's files keep both coordinates of a rotary pair side by side."""
