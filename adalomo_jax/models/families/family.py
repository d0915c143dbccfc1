"""What is said of a family of models, in a module for each."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from adalomo_jax.models.config import DecoderConfig


class Family(NamedTuple):
    """A family of models, by what it has otherwise than the others."""

    model_type: str
    """Its name in ``config.json``."""
    architecture: str
    """The class of Hugging Face's transformers."""
    sizes: Callable[[Mapping[str, Any]], dict[str, Any]]
    """The fields of `DecoderConfig` that only this family's ``config.json`` can tell, given that; ``ValueError`` if it
    describes no `Decoder`."""
    fields: Callable[[DecoderConfig], dict[str, Any] | None]
    """What this family's ``config.json`` says of them; None if none of its models is such a decoder."""
    gguf: str | None = None
    """Its name in llama.cpp's files; None if they have it under another family's."""
    pairs_side_by_side: bool = False
    """Whether llama.cpp's files have both coordinates of a rotary pair side by side."""
