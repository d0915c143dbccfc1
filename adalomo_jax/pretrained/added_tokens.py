"""Tokens that the files beside ``tokenizer.json`` add or name special, read as transformers reads them."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from adalomo_jax.models.fields import Fields, check, shown
from adalomo_jax.pretrained.json_files import read_json_if_there
from adalomo_jax.pretrained.rust_errors import as_value_errors

if TYPE_CHECKING:
    import tokenizers

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names of special tokens."""
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FLAGS = ("lstrip", "rstrip", "single_word")


def _text(value: Any) -> str:
    """A token's text. Half a surrogate pair is refused: JSON can hold one, tokenizers cannot."""
    if not isinstance(value, str) or not value or value.encode(errors="replace").decode() != value:
        raise ValueError("be a token's text, or an object with one as its content")
    return value


class AddedToken(Fields):
    """A token that the tokenizer finds in a text before it cuts the text."""

    content: Annotated[str, BeforeValidator(_text)]
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None
    changes: bool = False
    """Whether it changes how an existing token is found: if an object gives it, not a text."""

    def of_library(self, special: bool = False) -> tokenizers.AddedToken:
        """This token in the library ``tokenizers``; ``special`` if another file names it so."""
        import tokenizers

        normalized = not self.special if self.normalized is None else self.normalized
        flags = {name: getattr(self, name) for name in _FLAGS}
        is_special = self.special or special
        return tokenizers.AddedToken(self.content, normalized=normalized, special=is_special, **flags)


def _special(value: Any) -> Any:
    """A special token: a text, or an object."""
    if value is None:
        return None
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        said = {"content": _text(value["content"]), "special": True, "changes": True}
        return AddedToken.model_validate({**value, **said})
    return AddedToken(content=_text(value), special=True)


def _listed(value: Any) -> Any:
    """Special tokens without a role; transformers 4 gives the extra ones names, 5 puts them in a list."""
    if value is None:
        return ()
    values = list(value.values()) if isinstance(value, Mapping) else value
    if not isinstance(values, list) or None in values:
        raise ValueError("be a list of tokens, each a text or an object with one as its content")
    return tuple(map(_special, values))


Special = Annotated[AddedToken | None, BeforeValidator(_special)]
_Listed = Annotated[tuple[AddedToken, ...], BeforeValidator(_listed)]


class SpecialTokens(Fields):
    """The special tokens that a file names."""

    bos_token: Special = None
    eos_token: Special = None
    unk_token: Special = None
    sep_token: Special = None
    pad_token: Special = None
    cls_token: Special = None
    mask_token: Special = None
    additional_special_tokens: _Listed = ()
    extra_special_tokens: _Listed = ()
    added_tokens_decoder: dict[str, AddedToken] | None = None

    def named(self, described: Container[str]) -> tuple[AddedToken, ...]:
        """Each token once, in the order in which transformers adds them; one with a role changes no token that
        ``described`` has."""
        with_role = [token for role in ROLES if (token := getattr(self, role)) is not None]
        first: dict[str, AddedToken] = {}
        for token in with_role:
            changes = token.changes and token.content not in described
            first.setdefault(token.content, token.model_copy(update={"changes": changes}))
        for token in (*self.additional_special_tokens, *self.extra_special_tokens):
            first.setdefault(token.content, token)
        return tuple(first.values())


def read_special_tokens(folder: Path) -> SpecialTokens:
    """Read ``tokenizer_config.json``; if it has no ``added_tokens_decoder``, ``special_tokens_map.json`` as well.

    The map is the older file and takes precedence over the configuration.
    """
    path = folder / MAP
    tokens = check(SpecialTokens, read_json_if_there(folder / CONFIG), str(folder / CONFIG))
    if tokens.added_tokens_decoder is not None:
        return tokens
    contents = read_json_if_there(path)
    of_map = check(SpecialTokens, contents, str(path))
    changed = {role: getattr(of_map, role) for role in ROLES if role in contents}
    additional = dict.fromkeys((*tokens.additional_special_tokens, *of_map.additional_special_tokens))
    return tokens.model_copy(update={**changed, "additional_special_tokens": tuple(additional)})


def add_tokens(tokenizer: tokenizers.Tokenizer, folder: Path, special: SpecialTokens) -> None:
    """Have the tokenizer find the tokens that files of the folder add, and the special ones that it has.

    A special token that no vocabulary has is left out: no model has a row for it.

    Raises:
        ValueError: a file is invalid, or a token gets another number after those of ``tokenizer.json``.
    """
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    decoder = special.added_tokens_decoder
    named = special.named(known if decoder is None else {token.content for token in decoder.values()})
    texts = {token.content for token in named}
    tokens = _by_number(folder, decoder or {}, texts)
    added = [token.of_library(token.content in texts) for _, token in sorted(tokens.items())]
    new = [token for token in added if repr(token) != repr(known.get(token.content))]
    is_found = {*known, *(token.content for token in added)}
    has_row = lambda text: text in is_found or tokenizer.token_to_id(text) is not None
    rest = [token for token in named if has_row(token.content)]
    new += [token.of_library(True) for token in rest if token.changes or token.content not in is_found]
    with as_value_errors(f"{folder}: its added tokens cannot be added"):
        tokenizer.add_tokens(new)
    for number, token in tokens.items():
        if (got := tokenizer.token_to_id(token.content)) != number:
            raise ValueError(
                f"{folder}: the token {shown(token.content)} must be {number}, as in added_tokens_decoder or {ADDED}, "
                f"but with the tokens of tokenizer.json it is {got}"
            )


def _by_number(folder: Path, decoder: Mapping[str, AddedToken], special: set[str]) -> dict[int, AddedToken]:
    """The tokens that files beside ``tokenizer.json`` add, by their numbers."""
    tokens: dict[int, AddedToken] = {}
    for number, token in decoder.items():
        if not (number.isascii() and number.isdecimal() and int(number[:20]) < 2**32):
            raise ValueError(
                f"{folder / CONFIG}: added_tokens_decoder must have tokens by their numbers, got {shown(number)}"
            )
        tokens[int(number)] = token
    path = folder / ADDED
    for text, number in read_json_if_there(path).items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**32:
            raise ValueError(f"{path}: {shown(text)} must be the number of a token, got {shown(number)}")
        tokens.setdefault(number, check(AddedToken, {"content": text, "special": text in special}, str(path)))
    return tokens
