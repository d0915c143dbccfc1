"""Functions that write folders with a broken or hostile tokenizer.json."""

import base64
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_tokenizers import byte_level

DEEP = "[" * 200_000


def base() -> dict[str, Any]:
    return json.loads(byte_level(bos=True).to_str())


def put(path: str, value: Any) -> Callable[[Path], None]:
    """Change one value in the tokenizer.json of a good tokenizer."""

    def write(folder: Path) -> None:
        content = base()
        inner = content
        *parents, last = path.split(".")
        for name in parents:
            inner = inner[name]
        inner[last] = value
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return write


def raw(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Give one file of a good folder this content."""

    def write(folder: Path) -> None:
        byte_level(bos=True).save(str(folder / "tokenizer.json"))
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def model(kind: str, **fields: Any) -> Callable[[Path], None]:
    return put("model", {"type": kind, **fields})


def _sequence(kind: str, name: str, items: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", name: items}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _template(*special: tuple[str, int], single: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "type": "TemplateProcessing",
        "single": [
            *({"SpecialToken": {"id": name, "type_id": 0}} for name in single),
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in special},
    }


def _nested(kind: str, name: str, depth: int) -> Any:
    inner: Any = {"type": "NFC"}
    for _ in range(depth):
        inner = _sequence(kind, name, [inner])
    return inner


def _charsmap(content: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def fifo(folder: Path, name: str = "tokenizer.json") -> None:
    raw("x", "")(folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def linked(folder: Path, name: str, target: str) -> None:
    raw("x", "")(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


NORMALIZERS = {
    "prepend-10-mb": {"type": "Prepend", "prepend": "a" * 10_000_000},
    "replace-100-five-times": _sequence("", "normalizers", [_replace({"String": "a"}, "a" * 100)] * 5),
    "replace-nothing": _sequence("", "normalizers", [_replace({"Regex": ""}, "ab")] * 40),
    "regex-without-end": _replace({"Regex": "(a+)+$"}, "b"),
    "regex-broken": _replace({"Regex": "(("}, "b"),
    "charsmap-noise": _charsmap(b"\x08\0\0\0" + b"\xff" * 50),
    "charsmap-empty": _charsmap(b""),
    "charsmap-loop": _charsmap(b"\x10\0\0\0" + b"\0" * 16 + b"a\0"),
    "charsmap-long": _charsmap(b"\x04\0\0\0" + b"\0" * 4 + b"a" * 1_000_000 + b"\0"),
    "charsmap-no-base64": {"type": "Precompiled", "precompiled_charsmap": "\x00é"},
    "number": 5,
    "text": "NFC",
    "unknown": {"type": "Other"},
    "deep": _nested("", "normalizers", 120),
    "deeper": _nested("", "normalizers", 400),
    "many": _sequence("", "normalizers", [{"type": "NFC"}] * 10_000),
    "null-inside": _sequence("", "normalizers", [None]),
}
WORDS = {"the": 0, "cat": 1}
TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "deep": raw("tokenizer.json", DEEP),
    "deep-objects": raw("tokenizer.json", '{"a":' * 100_000),
    "deep-within": raw("tokenizer.json", '{"model": ' + "[" * 900 + "]" * 900 + "}"),
    "list": raw("tokenizer.json", "[]"),
    "empty": raw("tokenizer.json", ""),
    "empty-object": raw("tokenizer.json", "{}"),
    "cut": raw("tokenizer.json", byte_level().to_str()[:1000]),
    "binary": raw("tokenizer.json", os.urandom(100)),
    "utf-16": raw("tokenizer.json", byte_level().to_str().encode("utf-16")),
    "digits": raw("tokenizer.json", '{"model": ' + "1" * 5000 + "}"),
    "fifo": fifo,
    "endless": lambda folder: linked(folder, "tokenizer.json", "/dev/zero"),
    "link-loop": lambda folder: linked(folder, "tokenizer.json", "tokenizer.json"),
    "a-folder": lambda folder: (folder / "tokenizer.json").mkdir(),
    "none": lambda folder: None,
    **{f"model-{value!r:.12}": put("model", value) for value in (None, 5, "BPE", [], {}, True)},
    **{
        f"vocab-{value!r:.12}": put("model.vocab", value)
        for value in (None, 5, [], {}, [["a", 1.0]], {"a": -1}, {"a": 1.5})
    },
    "vocab-2**32-1": put("model.vocab", {"a": 2**32 - 1}),
    "vocab-2**64": put("model.vocab", {"a": 2**64}),
    "vocab-twice": put("model.vocab", {"a": 0, "b": 0}),
    "vocab-half-a-pair": put("model.vocab", {"\ud800": 0}),
    **{
        f"merges-{value!r:.12}": put("model.merges", value)
        for value in (None, 5, ["a"], [["a", "zz"]], [[1, 2]], {"a": 1})
    },
    **{f"dropout-{value!r}": put("model.dropout", value) for value in (0.1, 1.0, 2.0, -1, "x", True)},
    **{
        f"bpe-{name}": put(f"model.{name}", 5)
        for name in ("unk_token", "continuing_subword_prefix", "fuse_unk", "byte_fallback")
    },
    "bpe-prefix-long": put("model.continuing_subword_prefix", "a" * 1_000_000),
    "bpe-prefix": put("model.continuing_subword_prefix", "##"),
    "bpe-no-unk": model("BPE", vocab=WORDS, merges=[]),
    "bpe-unk-missing": model("BPE", vocab=WORDS, merges=[], unk_token="<unk>"),
    "word-level-unk-missing": model("WordLevel", vocab=WORDS, unk_token="<unk>"),
    "word-piece-unk-missing": model(
        "WordPiece", vocab=WORDS, unk_token="<unk>", continuing_subword_prefix="##", max_input_chars_per_word=100
    ),
    "word-piece-no-length": model(
        "WordPiece", vocab=WORDS, unk_token="the", continuing_subword_prefix="##", max_input_chars_per_word=0
    ),
    "word-piece-2**64": model(
        "WordPiece", vocab=WORDS, unk_token="the", continuing_subword_prefix="##", max_input_chars_per_word=2**64
    ),
    "unigram-no-unk": model("Unigram", vocab=[["a", -1.0]], unk_id=None),
    "unigram-unk-outside": model("Unigram", vocab=[["a", -1.0]], unk_id=7),
    "unigram-empty": model("Unigram", vocab=[], unk_id=None),
    "unigram-empty-piece": model("Unigram", vocab=[["", 0.0], ["a", 1e308]], unk_id=0),
    "unigram-bytes": model("Unigram", vocab=[["a", -1.0]], unk_id=0, byte_fallback=True),
    **{
        f"added-{i}": put("added_tokens", value)
        for i, value in enumerate(
            (
                5,
                [5],
                [None],
                [{}],
                [{"id": -1, "content": "a"}],
                [{"id": 2**32 - 1, "content": "a"}],
                [{"id": 0, "content": 5}],
                [
                    {
                        "id": 9**9,
                        "content": "<a>",
                        "special": True,
                        "single_word": False,
                        "lstrip": False,
                        "rstrip": False,
                        "normalized": False,
                    }
                ],
                [
                    {
                        "id": 0,
                        "content": "",
                        "special": True,
                        "single_word": False,
                        "lstrip": False,
                        "rstrip": False,
                        "normalized": False,
                    }
                ],
            )
        )
    },
    **{
        f"post-{i}": put("post_processor", value)
        for i, value in enumerate(
            (
                5,
                "x",
                {},
                {"type": "Sequence"},
                _sequence("", "processors", [None]),
                _sequence("", "processors", [5]),
                {"type": "Sequence", "processors": None},
                {"type": "Sequence", "processors": 5},
                {"type": "ByteLevel", "trim_offsets": 5},
                {"type": "ByteLevel", "trim_offsets": None},
                _template(("<a>", 2**32 - 1), single=("<a>",)),
                _template(("<a>", 10**6), single=("<a>",)),
                _template(single=("<a>",)),
                _template(("<|im_end|>", 1), single=("<|im_end|>",) * 1000),
                _template() | {"single": [{"Sequence": {"id": "A", "type_id": 0}}] * 1000},
                _template() | {"single": [{"Sequence": {"id": "B", "type_id": 0}}]},
                _template(("<a>", -1), single=("<a>",)),
                {"type": "BertProcessing", "sep": ["a", 9**9], "cls": ["b", 1]},
            )
        )
    },
    **{f"normalizer-{name}": put("normalizer", value) for name, value in NORMALIZERS.items()},
    **{
        f"split-{i}": put("pre_tokenizer", value)
        for i, value in enumerate(
            (
                5,
                {"type": "Split"},
                {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False},
                {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
                {"type": "Split", "pattern": {"Regex": "(?<=a{1,50}){1,50}b"}, "behavior": "Isolated", "invert": False},
                {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
                {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": True},
                {"type": "Metaspace", "replacement": "a" * 5000, "prepend_scheme": "always", "split": True},
                {"type": "FixedLength", "length": 0},
                {"type": "Punctuation", "behavior": "x"},
            )
        )
    },
    **{
        f"decoder-{i}": put("decoder", value)
        for i, value in enumerate(
            (
                5,
                {"type": "x"},
                _replace({"String": "a"}, "a" * 100_000_000),
                {"type": "Strip", "content": "ab", "start": 1, "stop": 0},
                {"type": "Strip", "content": "a", "start": 2**63, "stop": 2**63},
                {"type": "Strip", "content": "t", "start": 2**63, "stop": 2**63},
                _sequence("", "decoders", [_replace({"String": ""}, "aa")] * 30),
                {"type": "WordPiece", "prefix": "a" * 1_000_000, "cleanup": True},
            )
        )
    },
    **{
        f"cut-off-{i}": put(name, value)
        for i, (name, value) in enumerate(itertools.product(("truncation", "padding", "version"), (5, "x", {}, [])))
    },
}
