"""Text as tokens: bytes, or the tokenizer of a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from adalomo_jax.pretrained.chat import ChatText, chat_prompt, chat_text
from adalomo_jax.pretrained.files import write_whole
from adalomo_jax.pretrained.json_files import read_json

if TYPE_CHECKING:
    import tokenizers


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

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The tokens as text, without special ones."""
        ...

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> ChatText:
        """A conversation as text; ``ValueError`` where there is no template, or it refuses the messages."""
        ...


class ByteTokenizer:
    """Token i is the byte i of UTF-8 text. No token ends a document, and there is no chat template.

    >>> ByteTokenizer().encode(["é!"])[0].tokens.tolist()
    [195, 169, 33]
    """

    vocab_size: int = 256
    eos: int | None = None

    def encode(self, texts: Sequence[str], *, add_special: bool = True) -> list[Encoded]:
        """The bytes of each text; ``UnicodeEncodeError``, a ``ValueError``, for half a surrogate pair: it has none."""
        return [_encode_bytes(text) for text in texts]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of the bytes; what is no UTF-8, or no byte where a model knows more tokens, becomes U+FFFD."""
        unknown = "\N{REPLACEMENT CHARACTER}".encode()
        known = (bytes([token]) if token < self.vocab_size else unknown for token in tokens)
        return b"".join(known).decode(errors="replace")

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> ChatText:
        """Raises ``ValueError``."""
        raise ValueError("bytes have no chat template; conversations need a checkpoint with one")


def _encode_bytes(text: str) -> Encoded:
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    starts = np.cumsum(tokens & 0xC0 != 0x80) - 1  # a byte 10xxxxxx continues a character
    return Encoded(tokens, np.stack([starts, starts + 1], axis=-1).astype(np.int32).reshape(-1, 2))


@dataclasses.dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A tokenizer of the ``tokenizers`` library, its special tokens and its chat template."""

    tokenizer: tokenizers.Tokenizer
    eos: int | None = None
    """The token that ends a document."""
    bos: int | None = None
    """The token that starts one, for the chat template; whether it is added to a text is up to the tokenizer."""
    chat_template: str | None = None

    def __post_init__(self) -> None:
        for name in ("bos", "eos"):
            token = getattr(self, name)
            if token is not None and self.tokenizer.id_to_token(token) is None:
                raise ValueError(f"{name} must be a token of the vocabulary, got {token}")

    @property
    def vocab_size(self) -> int:
        """One more than the largest token, added ones included: what an embedding must have at least."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], *, add_special: bool = True) -> list[Encoded]:
        """Each text as tokens. Special tokens that a text spells out are taken as such.

        Args:
            texts: any number of texts.
            add_special: as the tokenizer's post-processor does: Llama's add BOS.

        Raises:
            UnicodeEncodeError: a text with half a surrogate pair (a ``ValueError``).
        """
        try:
            encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=add_special)
        except TypeError:  # that is all the library says of half a surrogate pair
            for text in texts:
                text.encode()
            raise
        return [Encoded(np.array(e.ids, np.int32), np.array(e.offsets, np.int32).reshape(-1, 2)) for e in encodings]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The tokens as text, without special ones; parts of a character become U+FFFD."""
        return self.tokenizer.decode([int(token) for token in tokens])

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> ChatText:
        """A conversation by the chat template, as ``chat_text`` says.

        Raises:
            ValueError: there is no template, or it refuses the messages.
        """
        return chat_text(self._template(), messages, **self._special_texts())

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text that the assistant's answer to the messages continues; ``ValueError`` as in ``chat``."""
        return chat_prompt(self._template(), messages, **self._special_texts())

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, as ``read_tokenizer`` and transformers read them."""
        write_whole(folder / "tokenizer.json", lambda path: self.tokenizer.save(str(path)))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._special_texts(),
            "chat_template": self.chat_template,
        }
        text = json.dumps({name: value for name, value in config.items() if value is not None}, indent=2)
        write_whole(folder / "tokenizer_config.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))

    def _template(self) -> str:
        if self.chat_template is None:
            raise ValueError("the checkpoint has no chat template; conversations need one that was tuned for them")
        return self.chat_template

    def _special_texts(self) -> dict[str, str | None]:
        texts = {"bos_token": self.bos, "eos_token": self.eos}
        return {name: None if token is None else self.tokenizer.id_to_token(token) for name, token in texts.items()}


def read_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer of a Hugging Face folder.

    It is ``tokenizer.json`` without the truncation and padding that it may carry. The special tokens are those of
    ``tokenizer_config.json``, and where that names none those of ``generation_config.json`` or ``config.json``, of
    several the first. The chat template is ``chat_template.jinja``, or else that of ``tokenizer_config.json``.

    Raises:
        ValueError: there is no ``tokenizer.json``, a file cannot be read, or it says what cannot be.
    """
    tokenizer = _read_tokenizer_json(folder / "tokenizer.json")
    config = _read_if_there(folder / "tokenizer_config.json")
    eos, bos = (_special_token(folder, tokenizer, config, name) for name in ("eos", "bos"))
    try:
        return TextTokenizer(tokenizer, eos=eos, bos=bos, chat_template=_read_chat_template(folder, config))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    if not path.is_file():
        raise ValueError(
            f"{path.parent} has no tokenizer.json; transformers makes one of a tokenizer.model: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    content = read_json(path)
    content |= {"truncation": None, "padding": None}
    _keep_white_space(content.get("post_processor"))
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path} is no tokenizer: {error}") from error


def _keep_white_space(post_processor: Any) -> None:
    """A token's span is to hold the space that the token has, or one of spaces alone would stand for no text."""
    if isinstance(post_processor, dict):
        if "trim_offsets" in post_processor:
            post_processor["trim_offsets"] = False
        for inner in post_processor.get("processors", ()):
            _keep_white_space(inner)


def _special_token(folder: Path, tokenizer: tokenizers.Tokenizer, config: dict[str, Any], name: str) -> int | None:
    text = config.get(f"{name}_token")
    text = text.get("content") if isinstance(text, dict) else text
    if text is not None:
        token = tokenizer.token_to_id(text)
        if token is None:
            raise ValueError(f"{folder / 'tokenizer_config.json'}: the {name}_token {text!r} is not in tokenizer.json")
        return token
    for file in ("generation_config.json", "config.json"):
        token = _read_if_there(folder / file).get(f"{name}_token_id")
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int):
            return token
        if token is not None:
            raise ValueError(f"{folder / file}: {name}_token_id must be a token or a list of tokens, got {token!r}")
    return None


def _read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    template = config.get("chat_template")
    if not isinstance(template, list):
        return template
    named = {entry["name"]: entry["template"] for entry in template}
    if "default" not in named:
        raise ValueError(f"of several chat templates one must be named 'default', got {', '.join(sorted(named))}")
    return named["default"]


def _read_if_there(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no file."""
    return read_json(path) if path.is_file() else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
