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
"""Characters of a long text that are read at once, and how many of them a second time with the following ones."""


class Encoded(NamedTuple):
    """A text as tokens."""

    tokens: np.ndarray
    """int32 ``[n]``."""
    spans: np.ndarray
    """int32 ``[n, 2]``, of parts int64: the characters of the text, from and to, that a token stands for. Tokens that
    are parts of one character have the same span; one that stands for no text (BOS) has an empty one."""


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

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens at which generation ends: ``eos`` and what else ends a turn."""
        ...

    def encode(self, texts: Sequence[str], *, add_special: bool = True) -> list[Encoded]:
        """Each text as tokens; ``add_special`` adds those that start and end a text, as the tokenizer is told to."""
        ...

    def parts(self, text: str, *, add_special: bool = True) -> Iterator[Encoded]:
        """The tokens of one text, of any length, in parts that take little memory each; errors are as in ``encode``."""
        ...

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The tokens as text, without special ones."""
        ...

    def chat(
        self, messages: Iterable[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> ChatText:
        """A conversation as text; ``ValueError`` where there is no template, or it refuses the messages."""
        ...


class ByteTokenizer:
    """Token i is the byte i of UTF-8 text. No token ends a document, and there is no chat template.

    >>> ByteTokenizer().encode(["é!"])[0].tokens.tolist()
    [195, 169, 33]
    """

    vocab_size: int = 256
    eos: int | None = None
    stops: tuple[int, ...] = ()

    def encode(self, texts: Sequence[str], *, add_special: bool = True) -> list[Encoded]:
        """The bytes of each text; ``UnicodeEncodeError``, a ``ValueError``, for half a surrogate pair: it has none."""
        return [_encode_bytes(text) for text in texts]

    def parts(self, text: str, *, add_special: bool = True) -> Iterator[Encoded]:
        """The bytes of a text, in parts."""
        for start in range(0, max(1, len(text)), WINDOW):
            yield _moved(_encode_bytes(text[start : start + WINDOW]), start)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of the bytes; what is no UTF-8, or no byte where a model knows more tokens, becomes U+FFFD."""
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
    """Of a part of a text that begins at a character."""
    return encoded._replace(spans=encoded.spans + np.int64(start))


@dataclasses.dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A tokenizer of the ``tokenizers`` library, its special tokens and its chat template."""

    tokenizer: tokenizers.Tokenizer
    eos: int | None = None
    """The token that ends a document."""
    bos: int | None = None
    """The token that starts one, for the chat template; whether it is added to a text is up to the tokenizer."""
    chat_template: str | None = None
    stops: tuple[int, ...] = ()
    """The tokens at which generation ends: ``eos``, which need not be named, and those that end a turn."""
    tool_template: str | None = None
    """The chat template of conversations with tools, where they have one of their own."""

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
        """One more than the largest token, added ones included: what an embedding must have at least."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], *, add_special: bool = True) -> list[Encoded]:
        """Each text as tokens. Special tokens that a text spells out are taken as such.

        Args:
            texts: any number of texts.
            add_special: as the tokenizer's post-processor does: Llama's add BOS. A text that spells out the token that
                would be added before or after it gets no second one.

        Raises:
            UnicodeEncodeError: a text with half a surrogate pair (a ``ValueError``).
            ValueError: a text that the tokenizer cannot read, as one with characters that it has no token for.
        """
        found = self._encode(texts, add_special)
        return [self._once(encoded) for encoded in found] if add_special else found

    def parts(self, text: str, *, add_special: bool = True) -> Iterator[Encoded]:
        """The tokens of a text, in parts.

        The text is read in windows that overlap, and joined where both windows have the same tokens for thousands of
        characters: how a text is cut depends on its nearest words alone in the tokenizers that are in use. Where they
        do not agree, the rest of the text is read at once.
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
        """A conversation by the chat template, as ``chat_text`` says.

        Raises:
            ValueError: there is no template, or it refuses the messages.
        """
        template = self.template(bool(tools))
        return chat_text(template, messages, tools=tools, **self._special_texts())

    def prompt(self, messages: Iterable[Mapping[str, Any]]) -> str:
        """The text that the assistant's answer to the messages continues; ``ValueError`` as in ``chat``."""
        return chat_prompt(self.template(), messages, **self._special_texts())

    def template(self, has_tools: bool = False) -> str:
        """The chat template that writes a conversation, with tools or without; ``ValueError`` where there is none."""
        template = self.tool_template if has_tools and self.tool_template is not None else self.chat_template
        if template is None:
            raise ValueError("the checkpoint has no chat template; conversations need one that was tuned for them")
        return template

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, as ``read_tokenizer`` and transformers read them.

        Where generation ends at more tokens than ``eos``, ``generation_config.json`` names them.
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
        except TypeError:  # that is all the library says of half a surrogate pair
            for text in texts:
                text.encode()
            raise

    def _once(self, encoded: Encoded) -> Encoded:
        """Without a token that was added beside one that the text spells out: before it BOS, after it EOS."""
        tokens, spans = encoded
        is_added = lambda i: spans[i, 0] == spans[i, 1]
        first = len(tokens) > 1 and tokens[0] == tokens[1] == self.bos and is_added(0) and not is_added(1)
        last = len(tokens) > 1 and tokens[-1] == tokens[-2] == self.eos and is_added(-1) and not is_added(-2)
        kept = slice(int(first), len(tokens) - int(last))
        return Encoded(tokens[kept], spans[kept])


def _slice(encoded: Encoded, begin: int, end: int) -> Encoded:
    return Encoded(encoded.tokens[begin:end], encoded.spans[begin:end])


def _agree(left: Encoded, right: Encoded, begin: int, end: int) -> tuple[int, int] | None:
    """Where two readings of a text can be joined: the first token of each of those that lie between two characters, if
    they are the same tokens for the same characters."""
    within = [np.flatnonzero((one.spans[:, 0] >= begin) & (one.spans[:, 1] <= end)) for one in (left, right)]
    if not all(map(len, within)):
        return None
    tokens = [_slice(one, i[0], i[-1] + 1) for one, i in zip((left, right), within)]
    is_same = all(np.array_equal(a, b) for a, b in zip(*tokens))
    return (int(within[0][0]), int(within[1][0])) if is_same else None


def is_token(tokenizer: tokenizers.Tokenizer, token: Any) -> bool:
    """Whether it is the number of a token, added ones included.

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
