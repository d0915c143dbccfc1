"""Text as tokens: bytes, or the tokenizer of a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from adalomo_jax.models.fields import shown
from adalomo_jax.pretrained.chat import ChatText, chat_prompt, chat_text
from adalomo_jax.pretrained.files import write_whole
from adalomo_jax.pretrained.json_files import write_json
from adalomo_jax.pretrained.rust_errors import as_value_errors

if TYPE_CHECKING:
    import tokenizers


WINDOW, OVERLAP = 2**17, 2**13
"""How many characters of a long text are read at once, and how many of them are read again with the next ones."""


class Encoded(NamedTuple):
    """A text as tokens."""

    tokens: np.ndarray
    """int32 ``[n]``."""
    spans: np.ndarray
    """int32 ``[n, 2]``, or int64 for parts: the characters of the text, from and to, that a token stands for. Tokens
    that are parts of one character have the same span; a token that stands for no text (BOS) has an empty one."""


class Tokenizer(Protocol):
    """Turns text into tokens, and tokens into text."""

    @property
    def vocab_size(self) -> int:
        """Every token is less than this."""
        ...

    @property
    def eos(self) -> int | None:
        """The token that ends a document."""
        ...

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens at which generation ends: ``eos`` and those that end a turn."""
        ...

    def encode(self, texts: Sequence[str], *, add_special: bool = True) -> list[Encoded]:
        """Each text as tokens; ``add_special`` adds those that start and end a text, as the tokenizer is set to do."""
        ...

    def parts(self, text: str, *, add_special: bool = True) -> Iterator[Encoded]:
        """The tokens of a text of any length, in parts that each take little memory; errors are as in ``encode``."""
        ...

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The tokens as text, without special ones."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a chat template."""
        ...

    def chat(
        self, messages: Iterable[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> ChatText:
        """A conversation as text; ``ValueError`` if there is no template, or it refuses the messages."""
        ...


class ByteTokenizer:
    """Token i is the byte i of UTF-8 text. No token ends a document, and there is no chat template.

    >>> ByteTokenizer().encode(["é!"])[0].tokens.tolist()
    [195, 169, 33]
    """

    vocab_size: int = 256
    eos: int | None = None
    stops: tuple[int, ...] = ()
    has_chat_template: bool = False

    def encode(self, texts: Sequence[str], *, add_special: bool = True) -> list[Encoded]:
        """The bytes of each text; half a surrogate pair has none: ``UnicodeEncodeError``, which is a ``ValueError``."""
        return [_encode_bytes(text) for text in texts]

    def parts(self, text: str, *, add_special: bool = True) -> Iterator[Encoded]:
        """The bytes of a text, in parts."""
        for start in range(0, max(1, len(text)), WINDOW):
            yield _moved(_encode_bytes(text[start : start + WINDOW]), start)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of the bytes; invalid UTF-8 becomes U+FFFD, and so do a model's tokens that are no bytes."""
        unknown = "\N{REPLACEMENT CHARACTER}".encode()
        known = (bytes([token]) if token < self.vocab_size else unknown for token in tokens)
        return b"".join(known).decode(errors="replace")

    def chat(
        self, messages: Iterable[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> ChatText:
        """Raises ``ValueError``."""
        raise ValueError("bytes have no chat template; conversations need a checkpoint with one")


def _encode_bytes(text: str) -> Encoded:
    tokens = np.frombuffer(text.encode(), np.uint8)
    starts = np.cumsum(tokens & 0xC0 != 0x80, dtype=np.int32) - 1  # a byte 10xxxxxx continues a character
    return Encoded(tokens.astype(np.int32), np.stack([starts, starts + 1], axis=-1))


def _moved(encoded: Encoded, start: int) -> Encoded:
    """The tokens of a part of a text that begins at the character ``start``, with spans in the whole text."""
    return encoded._replace(spans=encoded.spans + np.int64(start))


@dataclasses.dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A tokenizer of the ``tokenizers`` library, its special tokens and its chat template."""

    tokenizer: tokenizers.Tokenizer
    eos: int | None = None
    """The token that ends a document."""
    bos: int | None = None
    """The token that starts a document, for the chat template; the tokenizer decides whether a text gets it."""
    chat_template: str | None = None
    stops: tuple[int, ...] = ()
    """The tokens at which generation ends: those that end a turn, and ``eos``, which is added if it is not named."""
    tool_template: str | None = None
    """The chat template of conversations with tools, if they have one of their own."""

    def __post_init__(self) -> None:
        for name, token in (("bos", self.bos), ("eos", self.eos), *(("stops", token) for token in self.stops)):
            if token is not None and not is_token(self.tokenizer, token):
                raise ValueError(f"{name} must be a token of the vocabulary, got {shown(token)}")
        for template in (self.chat_template, self.tool_template):
            if not isinstance(template, str | None):
                raise ValueError(f"chat_template must be a string, got {shown(template)}")
        ends = () if self.eos is None else (self.eos,)
        object.__setattr__(self, "stops", tuple(dict.fromkeys((*ends, *self.stops))))

    @property
    def vocab_size(self) -> int:
        """One more than the largest token, added ones included: the least number of rows of an embedding."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], *, add_special: bool = True) -> list[Encoded]:
        """Each text as tokens. Special tokens that a text spells out count as special tokens.

        Args:
            texts: any number of texts.
            add_special: add tokens as the tokenizer's post-processor does: Llama's add BOS. A text that spells out the
                token that would be added before or after it gets no second one.

        Raises:
            UnicodeEncodeError: a text with half a surrogate pair (a ``ValueError``).
            ValueError: a text that the tokenizer cannot read, such as one with characters that have no token.
        """
        found = self._encode(texts, add_special)
        return [self._once(encoded) for encoded in found] if add_special else found

    def parts(self, text: str, *, add_special: bool = True) -> Iterator[Encoded]:
        """The tokens of a text, in parts.

        It reads the text in overlapping windows, and joins them where both have the same tokens for thousands of
        characters: in the tokenizers in use, how a text is cut depends only on its nearest words. If two windows do
        not agree, it reads the rest of the text at once.
        """
        once = self._once if add_special else lambda encoded: encoded
        start, begin = 0, 0
        [window] = self._encode([text[:WINDOW]], add_special)
        while start + WINDOW < len(text):
            following = start + WINDOW - OVERLAP
            [other] = self._encode([text[following : following + WINDOW]], add_special)
            window, other = _moved(window, 0), _moved(other, following)
            cuts = _agree(window, other, following + OVERLAP // 4, following + OVERLAP - OVERLAP // 4)
            if cuts is None:
                [window] = [_moved(rest, start) for rest in self._encode([text[start:]], add_special)]
                break
            yield once(_slice(window, begin, cuts[0]))
            window, begin, start = other, cuts[1], following
        yield once(_slice(window, begin, len(window.tokens)))

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The tokens as text, without special ones; parts of a character become U+FFFD."""
        with as_value_errors("the tokenizer cannot write the tokens", quiet=False):
            return self.tokenizer.decode([int(token) for token in tokens])

    def chat(
        self, messages: Iterable[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> ChatText:
        """A conversation as text, by the chat template; see ``chat_text``.

        Raises:
            ValueError: there is no template, or it refuses the messages.
        """
        template = self.template(bool(tools))
        return chat_text(template, messages, tools=tools, **self._special_texts())

    def prompt(self, messages: Iterable[Mapping[str, Any]]) -> str:
        """The text that the assistant's answer to the messages continues; ``ValueError`` as in ``chat``."""
        return chat_prompt(self.template(), messages, **self._special_texts())

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a chat template."""
        return self.chat_template is not None

    def template(self, has_tools: bool = False) -> str:
        """The chat template that writes a conversation, with tools or without; ``ValueError`` if there is none."""
        template = self.tool_template if has_tools and self.tool_template is not None else self.chat_template
        if template is None:
            raise ValueError("the checkpoint has no chat template; conversations need one that was tuned for them")
        return template

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, as ``read_tokenizer`` and transformers read them.

        If generation ends at other tokens than ``eos`` too, ``generation_config.json`` names them all.
        """
        write_whole(folder / "tokenizer.json", lambda path: self.tokenizer.save(str(path)))
        templates = {"default": self.chat_template, "tool_use": self.tool_template}
        named = [{"name": name, "template": template} for name, template in templates.items()]
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._special_texts(),
            "chat_template": self.chat_template if self.tool_template is None else named,
        }
        write_json(
            folder / "tokenizer_config.json", {name: value for name, value in config.items() if value is not None}
        )
        if self.stops not in ((), (self.eos,)):
            ends = {"eos_token_id": list(self.stops)}
            bos = {} if self.bos is None else {"bos_token_id": self.bos}
            write_json(folder / "generation_config.json", bos | ends)

    def _special_texts(self) -> dict[str, str | None]:
        texts = {"bos_token": self.bos, "eos_token": self.eos}
        return {name: None if token is None else self.tokenizer.id_to_token(token) for name, token in texts.items()}

    def _encode(self, texts: Sequence[str], add_special: bool) -> list[Encoded]:
        try:
            with as_value_errors("the tokenizer cannot read the text"):
                encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=add_special)
                return [
                    Encoded(np.array(e.ids, np.int32), np.array(e.offsets, np.int32).reshape(-1, 2)) for e in encodings
                ]
        except TypeError:  # the library says no more about half a surrogate pair
            for text in texts:
                text.encode()
            raise

    def _once(self, encoded: Encoded) -> Encoded:
        """Drop a BOS that was added before a BOS that the text spells out, and an EOS that was added after an EOS."""
        tokens, spans = encoded
        is_added = lambda i: spans[i, 0] == spans[i, 1]
        first = len(tokens) > 1 and tokens[0] == tokens[1] == self.bos and is_added(0) and not is_added(1)
        last = len(tokens) > 1 and tokens[-1] == tokens[-2] == self.eos and is_added(-1) and not is_added(-2)
        kept = slice(int(first), len(tokens) - int(last))
        return Encoded(tokens[kept], spans[kept])


def _slice(encoded: Encoded, begin: int, end: int) -> Encoded:
    return Encoded(encoded.tokens[begin:end], encoded.spans[begin:end])


def _agree(left: Encoded, right: Encoded, begin: int, end: int) -> tuple[int, int] | None:
    """Where two readings of a text can be joined: in each, the first token between the characters ``begin`` and
    ``end``; None unless both have the same tokens there for the same characters."""
    within = [np.flatnonzero((one.spans[:, 0] >= begin) & (one.spans[:, 1] <= end)) for one in (left, right)]
    if not all(map(len, within)):
        return None
    tokens = [_slice(one, i[0], i[-1] + 1) for one, i in zip((left, right), within)]
    is_same = all(np.array_equal(a, b) for a, b in zip(*tokens))
    return (int(within[0][0]), int(within[1][0])) if is_same else None


def is_token(tokenizer: tokenizers.Tokenizer, token: Any) -> bool:
    """Whether ``token`` is the number of a token, added ones included.

    >>> from tokenizers import Tokenizer, models
    >>> letters = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    >>> [is_token(letters, token) for token in (1, 2, -1, 1.0, True)]
    [True, False, False, False, False]
    """
    if isinstance(token, bool) or not isinstance(token, int | np.integer):
        return False
    return 0 <= int(token) < 2**32 and tokenizer.id_to_token(int(token)) is not None


def put_around(
    tokenizer: tokenizers.Tokenizer, before: Sequence[tuple[str, int]], after: Sequence[tuple[str, int]]
) -> None:
    """Have the tokenizer write these tokens, each by name and number, before a text and after it: BOS and EOS."""
    from tokenizers import processors

    names_before, names_after = ([name for name, _ in around] for around in (before, after))
    single = [*names_before, "$A", *names_after]
    pair = [*single, *(f"{name}:1" for name in names_before), "$B:1", *(f"{name}:1" for name in names_after)]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=single, pair=pair, special_tokens=[*before, *after]
    )
