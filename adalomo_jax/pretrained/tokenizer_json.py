"""The file ``tokenizer.json``: a tokenizer of the ``tokenizers`` library, and which parts are left out or refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalomo_jax.models.fields import shown
from adalomo_jax.pretrained.json_files import read_json
from adalomo_jax.pretrained.rust_errors import Panic, as_value_errors, one_line

if TYPE_CHECKING:
    import tokenizers

MOST_GROWTH = 64
"""The most characters that a tokenizer may put in the place of one. Tokenizers in use put one to four, and
SentencePiece's table 33 bytes for a single Arabic sign; a few hundred bytes of JSON could make it 10**10."""
MOST_ADDED = 64
"""The most tokens that a tokenizer may put around a text. Tokenizers in use add up to four."""
_TRIED = 300
"""How many tokens are decoded to see whether that fails; bytes come first in most vocabularies."""
_PROBE = "The 12 cats' \t\n\0 café e\u0301 日本語 \u202eعربي \U0001f44d\U0001f3fd \ufffd \ufb01 ﷺ"
"""A text of varied characters, to see whether the tokenizer's own code fails."""


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of the file, without any truncation and padding.

    Raises:
        ValueError: there is no file, it cannot be read, it holds no tokenizer, the tokenizer does not always give the
            same tokens, or it makes very much text from little.
    """
    import tokenizers

    if not path.exists():
        raise ValueError(
            f"{path.parent} has no tokenizer.json; transformers makes one from a tokenizer.model: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    content = read_json(path)
    content |= {"truncation": None, "padding": None}
    try:
        _check(content)
        _keep_white_space(content.get("post_processor"))
        with as_value_errors("the library cannot read it"):
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        _probe(tokenizer)
    except RecursionError:
        raise ValueError(f"{path} is no tokenizer: it has too many brackets inside each other") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no tokenizer: {one_line(error)}") from None
    return tokenizer


def _check(content: dict[str, Any]) -> None:
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"model must be an object, got {shown(model)}")
    if model.get("dropout"):
        raise ValueError(
            f"model.dropout must be null, got {shown(model['dropout'])}: it would read a text differently each time, "
            "and no run could continue from its checkpoint; write null there"
        )
    for part in _parts(content.get("post_processor")):
        single = part.get("single")
        texts = (
            [item for item in single if isinstance(item, dict) and "Sequence" in item]
            if isinstance(single, list)
            else [None]
        )
        if len(texts) != 1:
            raise ValueError(f"post_processor must write a text once, got a template that does {len(texts):,} times")
    for step in ("normalizer", "decoder", "pre_tokenizer"):
        growth = 1
        for part in _parts(content.get(step)):
            put = [part.get(name) for name in ("content", "prepend", "replacement", "prefix", "suffix")]
            growth *= max([1, *(len(text) for text in put if isinstance(text, str))])
            growth *= _longest_mapped(part)
            if growth > MOST_GROWTH:
                raise ValueError(
                    f"{step} must put at most {MOST_GROWTH:,} characters in the place of one, all its steps together; "
                    f"got {growth:,}"
                )


def _parts(step: Any) -> Iterator[dict[str, Any]]:
    """A step of a tokenizer and all steps within it."""
    if isinstance(step, dict):
        yield step
    inner = step.values() if isinstance(step, dict) else step if isinstance(step, list) else ()
    for value in inner:
        yield from _parts(value)


def _longest_mapped(part: dict[str, Any]) -> int:
    """The most bytes for a character in SentencePiece's table: a trie's size, the trie, texts that end with zeros."""
    if not isinstance(table := part.get("precompiled_charsmap"), str):
        return 1
    content = base64.b64decode(table)
    texts = content[4 + int.from_bytes(content[:4], "little") :]
    return max(1, *map(len, texts.split(b"\0"))) if b"\0" in texts else max(1, len(texts))


def _keep_white_space(post_processor: Any) -> None:
    """Keep a token's spaces in its span. Otherwise a token of spaces alone would stand for no text."""
    for part in _parts(post_processor):
        if "trim_offsets" in part:
            part["trim_offsets"] = False


def _probe(tokenizer: tokenizers.Tokenizer) -> None:
    """Fail now rather than later, in the middle of the text. A model need not know all characters."""
    if not tokenizer.get_vocab_size(with_added_tokens=True):
        raise ValueError("it has no tokens")
    with as_value_errors("it fails on an empty text"):
        added = tokenizer.encode("").ids
    if len(added) > MOST_ADDED:
        raise ValueError(f"post_processor must put at most {MOST_ADDED} tokens around a text, got {len(added):,}")
    for token in added:
        if tokenizer.id_to_token(token) is None:
            raise ValueError(f"post_processor adds the token {token}, which is not in the vocabulary")
    try:
        with as_value_errors("it fails on text"):
            some = tokenizer.encode(_PROBE).ids
            tokenizer.decode([*some, *range(min(_TRIED, tokenizer.get_vocab_size()))])
    except Panic:
        raise
    except ValueError:  # a character without a token, which later texts may not have
        pass
