"""Text as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class ChatText(NamedTuple):
    """A conversation as text. It has the special tokens already: encode it with ``add_special=False``."""

    text: str
    learned: tuple[tuple[int, int], ...]
    """The characters, from and to, that the assistant says (with its end-of-turn token)."""


class Encoded(NamedTuple):
    """A text as tokens."""

    tokens: np.ndarray
    """int32 ``[n]``."""
    spans: np.ndarray
    """int32 ``[n, 2]``: the characters of the text, from and to, that a token stands for. Tokens that are parts of one
    character have the same span; one that stands for no text (BOS) has an empty one."""


class Tokenizer(Protocol):
    """What makes tokens of text, and text of tokens."""

    @property
    def vocab_size(self) -> int:
        """Tokens are less than this."""
        ...

    @property
    def eos(self) -> int | None:
        """The token that ends a document."""
        ...

    def encode(self, texts: Sequence[str], *, add_special: bool = True) -> list[Encoded]:
        """Each text as tokens; ``add_special`` adds those that start and end a text, as the tokenizer is told to."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The tokens as text, without special ones."""
        ...

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> ChatText:
        """A conversation as text; ``ValueError`` where there is no template, or it refuses the messages."""
        ...
