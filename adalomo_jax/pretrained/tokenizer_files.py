"""The tokenizer of a Hugging Face folder, read from its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BeforeValidator

from adalomo_jax.models.fields import Fields, check, shown
from adalomo_jax.pretrained.added_tokens import AddedToken, add_tokens, read_special_tokens
from adalomo_jax.pretrained.json_files import read_json_if_there
from adalomo_jax.pretrained.rust_errors import as_value_errors, one_line
from adalomo_jax.pretrained.templates import MOST_BYTES
from adalomo_jax.pretrained.tokenizer import TextTokenizer, is_token, put_around
from adalomo_jax.pretrained.tokenizer_json import read_tokenizer_json

if TYPE_CHECKING:
    import tokenizers

_ADDS_BOS = {
    "LlamaTokenizer": True,
    "CodeLlamaTokenizer": True,
    "GemmaTokenizer": True,
    "CohereTokenizer": True,
    "GPTNeoXTokenizer": False,
}
"""The classes of transformers (4.57: ``tokenization_*_fast.py``) that put BOS and EOS around texts themselves, as
``add_bos_token`` and ``add_eos_token`` say, and whether they add BOS by default. All others leave it to
``tokenizer.json``: GPT2Tokenizer, Qwen2Tokenizer and PreTrainedTokenizerFast do not read these flags."""


class _Templates(NamedTuple):
    """Chat templates by their use."""

    default: str | None = None
    tool_use: str | None = None


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if value is None:
        return ()
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError("be a token or a list of tokens (whole numbers from 0 on)")
    return tuple(ids)


def _templates(value: Any) -> _Templates:
    if value is None or isinstance(value, str):
        return _Templates(value)
    is_named = lambda entry: (
        isinstance(entry, Mapping) and all(isinstance(entry.get(name), str) for name in ("name", "template"))
    )
    if not isinstance(value, list) or not all(map(is_named, value)):
        raise ValueError("be a template, or a list of objects, each with the strings name and template")
    named = {entry["name"]: entry["template"] for entry in value}
    if "default" not in named:
        raise ValueError("have a template with the name 'default'")
    return _Templates(named["default"], named.get("tool_use"))


_Ids = Annotated[Any, BeforeValidator(_token_ids)]


class _Config(Fields):
    """``tokenizer_config.json``."""

    tokenizer_class: str | None = None
    backend: str | None = None
    """Written by transformers 5, which leaves the flags out: ``tokenizer.json`` then says everything."""
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    chat_template: Annotated[Any, BeforeValidator(_templates)] = _Templates()


class _Ends(Fields):
    """``generation_config.json`` and ``config.json``."""

    bos_token_id: _Ids = ()
    eos_token_id: _Ids = ()


def read_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer of a Hugging Face folder.

    It is ``tokenizer.json`` without any truncation and padding, with the tokens that only ``tokenizer_config.json``
    (``added_tokens_decoder``) or ``added_tokens.json`` has. All tokens that are named special
    (``additional_special_tokens``, ``pad_token``, ...) are found in a text. BOS and EOS are put around a text as
    transformers' class of the name in ``tokenizer_config.json`` does: Llama's, Gemma's, Cohere's and GPT-NeoX's follow
    ``add_bos_token`` and ``add_eos_token``, all others ``tokenizer.json``.

    The special tokens are those of ``tokenizer_config.json`` and ``special_tokens_map.json``. If they do not name BOS
    or EOS, it is the first one in ``generation_config.json`` or ``config.json``. Generation ends at every EOS token
    that these files name. The chat template is ``chat_template.jinja``, or otherwise that of ``tokenizer_config.json``.

    Raises:
        ValueError: there is no ``tokenizer.json``, or a file cannot be read or is invalid.
    """
    tokenizer = read_tokenizer_json(folder / "tokenizer.json")
    path = folder / "tokenizer_config.json"
    config = check(_Config, read_json_if_there(path), str(path))
    special = read_special_tokens(folder)
    add_tokens(tokenizer, folder, special)
    _set_prefix_space(tokenizer, config)
    files = [folder / name for name in ("generation_config.json", "config.json")]
    ends = [(file, check(_Ends, read_json_if_there(file), str(file))) for file in files]
    bos = _special_token(tokenizer, path, "bos_token", special.bos_token, ends)
    eos = _special_token(tokenizer, path, "eos_token", special.eos_token, ends)
    stops = [_known(tokenizer, file, "eos_token_id", token) for file, said in ends for token in said.eos_token_id]
    _put_around(tokenizer, path, config, bos, eos)
    templates = _read_templates(folder, config)
    try:
        return TextTokenizer(tokenizer, eos, bos, templates.default, tuple(stops), templates.tool_use)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _special_token(
    tokenizer: tokenizers.Tokenizer, path: Path, name: str, named: AddedToken | None, ends: list[tuple[Path, _Ends]]
) -> int | None:
    if named is not None:
        token = tokenizer.token_to_id(named.content)
        if token is None:
            raise ValueError(f"{path}: the {name} {shown(named.content)} is not in tokenizer.json")
        return token
    for file, said in ends:
        if tokens := getattr(said, f"{name}_id"):
            return _known(tokenizer, file, f"{name}_id", tokens[0])
    return None


def _set_prefix_space(tokenizer: tokenizers.Tokenizer, config: _Config) -> None:
    """Set ``add_prefix_space`` of byte-level tokenizers, as transformers 4 does; Llama's class only does if told to."""
    from tokenizers import pre_tokenizers

    is_llama = (config.tokenizer_class or "").removesuffix("Fast") == "LlamaTokenizer"
    is_left = config.add_prefix_space is None and (is_llama or config.backend is not None)
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel) and not is_left:
        tokenizer.pre_tokenizer.add_prefix_space = bool(config.add_prefix_space)


def _known(tokenizer: tokenizers.Tokenizer, file: Path, name: str, token: int) -> int:
    if not is_token(tokenizer, token):
        raise ValueError(f"{file}: {name} must be a token of the vocabulary, got {shown(token)}")
    return token


def _put_around(tokenizer: tokenizers.Tokenizer, path: Path, config: _Config, bos: int | None, eos: int | None) -> None:
    """Replace the post-processor if the class of the tokenizer does."""
    by_default = _ADDS_BOS.get((config.tokenizer_class or "").removesuffix("Fast"))
    flags = {"add_bos_token": config.add_bos_token, "add_eos_token": config.add_eos_token}
    if by_default is None or (config.backend is not None and set(flags.values()) == {None}):
        return
    adds_bos = by_default and bos is not None if config.add_bos_token is None else config.add_bos_token
    around = []
    for name, adds, token in (("bos_token", adds_bos, bos), ("eos_token", config.add_eos_token, eos)):
        if adds and token is None:
            raise ValueError(f"{path}: add_{name} is true, but no {name} is named")
        around.append([(tokenizer.id_to_token(token), token)] if adds and token is not None else [])
    before, after = around
    try:
        with as_value_errors("they cannot be written"):
            put_around(tokenizer, before, after)
            got = tokenizer.encode("").ids
    except ValueError as error:
        raise ValueError(f"{path}: BOS and EOS must be names that a template takes: {one_line(error)}") from None
    if got != (wanted := [token for _, token in (*before, *after)]):
        raise ValueError(f"{path}: the tokens {wanted} must stand around a text, got {got}: their names mean others")


def _read_templates(folder: Path, config: _Config) -> _Templates:
    path = folder / "chat_template.jinja"
    if not path.exists():
        return config.chat_template
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} must be a regular file of at most {MOST_BYTES:,} bytes")
    try:
        return _Templates(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
