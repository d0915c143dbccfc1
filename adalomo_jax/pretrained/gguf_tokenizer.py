"""The tokenizer that a GGUF file describes, as the ``tokenizer.json`` of its checkpoint would have it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from adalomo_jax.models.fields import Fields, check, plain, shown
from adalomo_jax.pretrained.gguf_header import read_header
from adalomo_jax.pretrained.tokenizer import TextTokenizer, put_around

if TYPE_CHECKING:
    import tokenizers

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
"""Types of tokens (``gguf.TokenType``)."""

_MERGES_A_TOKEN = 16
"""On average: known vocabularies have 2, and one made of all runs of a letter up to n has n / 2."""

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


class _Splits(NamedTuple):
    """How text is cut before its bytes are merged: one value of ``tokenizer.ggml.pre``."""

    patterns: tuple[str, ...] = ()
    """Regular expressions that cut one after the other; without any, ``ByteLevel`` uses its own, GPT-2's."""
    digits: bool = False
    """Whether each digit is a piece of its own."""
    nfc: bool = False
    """Whether characters are composed first."""
    whole_words: bool = False
    """Whether a piece that is a token needs no merges."""
    bos: bool = False
    """Whether texts start with BOS if the file does not say."""


_Token = Annotated[str, Field(max_length=1024)]
_Id = Annotated[int, Field(ge=0, lt=2**31)]


class _TokenizerFields(Fields):
    """The metadata that is read, by names without ``tokenizer.`` and ``ggml.``."""

    model: str | None = None
    pre: str | None = None
    tokens: list[_Token] = Field(min_length=1, max_length=500_000)
    """The longest known ones are about 128 spaces. If there are no merges, all ways to cut a token are tried."""
    merges: list[Annotated[str, Field(max_length=2049)]] | None = Field(None, max_length=2_000_000)
    scores: list[float] | None = None
    token_type: list[int] | None = None
    bos_token_id: _Id | None = None
    eos_token_id: _Id | None = None
    eot_token_id: _Id | None = None
    eom_token_id: _Id | None = None
    unknown_token_id: _Id | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_space_prefix: bool | None = None
    chat_template: str | None = None


_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""The tokens that end a text, a turn or a message in llama.cpp."""
_LLAMA3 = _Splits((_LLAMA3_SPLIT,), whole_words=True, bos=True)
_PRE = {
    "default": _Splits((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _Splits(),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _Splits((_QWEN2_SPLIT,), nfc=True),
    "smollm": _Splits(digits=True),
}
"""From the ``tokenizer.json`` of GPT-2, Llama 3, Qwen2 and SmolLM2; ``default`` from llama.cpp."""


def tokenizer_of_gguf(path: Path) -> TextTokenizer:
    """The tokenizer in the metadata of a GGUF file, which is that of the checkpoint the file was made from.

    ``tokenizer.ggml.model`` is ``gpt2`` (byte-level BPE, cut as ``tokenizer.ggml.pre`` says) or ``llama`` (BPE of
    SentencePiece, with bytes for unknown characters). No tensor is read.

    Raises:
        ValueError: the file cannot be read, has no tokenizer, or has one of another kind.
    """
    fields = _read_fields(path)
    try:
        return _build(fields)
    except KeyError as error:
        raise ValueError(f"{path}: its tokenizer is incomplete: {plain(error)}") from error
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path}: {plain(error, 200)}") from error


def _read_fields(path: Path) -> dict[str, Any]:
    """The fields of `_TokenizerFields` that the file has."""
    fields, tensors = read_header(path, lambda name: name.startswith("tokenizer."))
    contents = {name.removeprefix("tokenizer.").removeprefix("ggml."): value for name, value in fields.items()}
    checked = check(_TokenizerFields, contents, f"{path}, tokenizer").model_dump(exclude_unset=True)
    embedding = tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape[0] < len(checked["tokens"]):
        tokens, rows = len(checked["tokens"]), embedding.shape[0]
        raise ValueError(f"{path}: its tokenizer has {tokens} tokens, more than the {rows} of its embedding")
    ids = [name for name in checked if name.endswith("_token_id")]
    for name in ids:
        if checked[name] >= len(checked["tokens"]):
            raise ValueError(f"{path}: {name} must be one of its {len(checked['tokens'])} tokens, got {checked[name]}")
    if len(kinds := checked.get("token_type", checked["tokens"])) != len(checked["tokens"]):
        raise ValueError(f"{path}: {len(checked['tokens'])} tokens need as many of token_type, got {len(kinds)}")
    return checked


def _build(fields: Mapping[str, Any]) -> TextTokenizer:
    builders: dict[str, Callable[[Mapping[str, Any]], tokenizers.Tokenizer]]
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if (kind := fields.get("model")) not in builders:
        raise ValueError(f"tokenizer.ggml.model must be one of {', '.join(builders)}, got {shown(kind)}")
    tokenizer = builders[kind](fields)
    _add_tokens(tokenizer, fields)
    _set_post_processor(tokenizer, fields)
    return TextTokenizer(
        tokenizer,
        eos=fields.get("eos_token_id"),
        bos=fields.get("bos_token_id"),
        chat_template=fields.get("chat_template"),
        stops=tuple(fields[name] for name in _STOPS if fields.get(name) is not None),
    )


def _byte_level(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """GPT-2's kind: it merges bytes, each written as a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    splits = _splits(fields)
    merges = [_pair(merge) for merge in fields["merges"]]
    tokenizer = Tokenizer(models.BPE(_vocabulary(fields), merges, ignore_merges=splits.whole_words))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if splits.digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splits.patterns]
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits.patterns)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    if splits.nfc:
        tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _splits(fields: Mapping[str, Any]) -> _Splits:
    if (pre := fields.get("pre")) not in _PRE:
        raise ValueError(f"tokenizer.ggml.pre, how text is cut, must be one of {', '.join(_PRE)}, got {shown(pre)}")
    return _PRE[pre]


def _sentencepiece(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Llama 2's kind: spaces become ``▁``, the text starts with one, and unknown characters become bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = [_pair(merge) for merge in fields["merges"]] if "merges" in fields else _merges_of_scores(fields)
    unknown = fields["tokens"][fields.get("unknown_token_id", 0)]
    model = models.BPE(_vocabulary(fields), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = fields.get("add_space_prefix", True)
    before = [normalizers.Prepend("▁")] if prefix else []
    after = [decoders.Strip(content=" ", left=1, right=0)] if prefix else []
    steps = [*before, normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer


def _merges_of_scores(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All ways to join two tokens into a third, the best third first, as in transformers' converter."""
    if len(fields["scores"]) != len(fields["tokens"]):
        raise ValueError(f"{len(fields['tokens'])} tokens need as many scores, got {len(fields['scores'])}")
    pieces = zip(fields["tokens"], fields["scores"], fields["token_type"])
    scores = {token: score for token, score, kind in pieces if kind == _NORMAL}
    cuts = (
        (score, cut, len(token) - cut, token[:cut], token[cut:])
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    )
    most = _MERGES_A_TOKEN * len(scores)
    found = list(itertools.islice(cuts, most + 1))
    if len(found) > most:
        raise ValueError(f"there must be at most {_MERGES_A_TOKEN} ways a token to join two of them, got more")
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in found]


def _vocabulary(fields: Mapping[str, Any]) -> dict[str, int]:
    tokens: Sequence[str] = fields["tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise ValueError(f"each token must occur once, got {shown(twice)} twice")
    return vocabulary


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _add_tokens(tokenizer: tokenizers.Tokenizer, fields: Mapping[str, Any]) -> None:
    """Have the tokenizer find special and user-defined tokens in a text before it cuts the text."""
    from tokenizers import AddedToken

    special = (_CONTROL, _UNKNOWN)
    added = [
        AddedToken(token, special=kind in special, normalized=False)
        for token, kind in zip(fields["tokens"], fields.get("token_type", ()))
        if kind in (*special, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)


def _set_post_processor(tokenizer: tokenizers.Tokenizer, fields: Mapping[str, Any]) -> None:
    """Put BOS before a text and EOS after it, if the file says so."""
    by_default = fields["model"] == "llama" or _splits(fields).bos
    before = _named(fields, "bos") if fields.get("add_bos_token", by_default) else []
    after = _named(fields, "eos") if fields.get("add_eos_token", False) else []
    if before or after:
        put_around(tokenizer, before, after)


def _named(fields: Mapping[str, Any], name: str) -> list[tuple[str, int]]:
    """A special token and its id, in a template's form."""
    if (token := fields.get(f"{name}_token_id")) is None:
        raise ValueError(f"tokenizer.ggml.add_{name}_token is set, but there is no tokenizer.ggml.{name}_token_id")
    return [(fields["tokens"][token], token)]
