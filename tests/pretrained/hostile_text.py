"""Broken and hostile tokenizers, configurations, chat templates and rows, and what becomes of each.

As a script it tries cases one after the other, and prints a line of JSON for each.
"""

import base64
import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from small_tokenizers import CHATML, byte_level

MEMORY = 6 << 30
"""Bytes of address space of a process that tries cases; JAX alone reserves more than one."""
DEEP = "[" * 200_000
MESSAGES = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "the mat"}]
TEXTS = ["the cat's 12 hats", "é 日本 \U0001f44d\0\ufffd ｱﬁ", "a" * 2_000 + "!", ""]


def base() -> dict[str, Any]:
    return json.loads(byte_level(bos=True).to_str())


def put(path: str, value: Any) -> Callable[[Path], None]:
    """The tokenizer.json of a good tokenizer with one value changed."""

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
    """A good folder with one file of this content."""

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


def _fifo(folder: Path, name: str = "tokenizer.json") -> None:
    raw("x", "")(folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def _linked(folder: Path, name: str, target: str) -> None:
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
    "fifo": _fifo,
    "endless": lambda folder: _linked(folder, "tokenizer.json", "/dev/zero"),
    "link-loop": lambda folder: _linked(folder, "tokenizer.json", "tokenizer.json"),
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

VALUES: list[str] = [
    "5",
    "-1",
    "1.5",
    "1e400",
    "NaN",
    "-Infinity",
    "true",
    "[]",
    "{}",
    "[1]",
    '{"a": 1}',
    '""',
    '"no such"',
    json.dumps("\x1b[31m\n\ud800"),
    json.dumps("a" * 1_000_000),
    "[" * 500 + "]" * 500,
    "1" * 4000,
    "[null]",
    '{"content": 5}',
    '{"content": "the", "x": [1]}',
    "[[1]]",
    "1" * 5000,
]
FIELDS = (
    "eos_token",
    "bos_token",
    "chat_template",
    "add_bos_token",
    "tokenizer_class",
    "added_tokens_decoder",
    "backend",
    "add_eos_token",
)
IDS = [
    "-1",
    "4294967296",
    "18446744073709551616",
    "1.0",
    "1.5",
    "true",
    '"1"',
    "[]",
    "[[1]]",
    "[null]",
    "{}",
    "[1, -1]",
    "[1, true]",
    "NaN",
    "[1e400]",
    "1" * 5000,
    DEEP,
    "[" * 500 + "]" * 500,
    '"' + "a" * 1_000_000 + '"',
    json.dumps([1] * 100_000),
    "300000",
    "-0.0",
]
CONFIGS: dict[str, Callable[[Path], None]] = {
    **{
        f"{field}-{i}": raw("tokenizer_config.json", f'{{"{field}": {value}}}')
        for field in FIELDS
        for i, value in enumerate(VALUES)
    },
    **{
        f"{file}-{i}": raw(f"{file}.json", f'{{"eos_token_id": {value}}}')
        for file in ("generation_config", "config")
        for i, value in enumerate(IDS)
    },
    **{
        f"{file}-bos-{i}": raw(f"{file}.json", f'{{"bos_token_id": {value}}}')
        for file in ("generation_config", "config")
        for i, value in enumerate(IDS)
    },
    **{
        f"added-{i}": raw("added_tokens.json", value)
        for i, value in enumerate(
            (
                DEEP,
                "[]",
                "",
                '{"<a>": -1}',
                '{"<a>": "1"}',
                '{"<a>": null}',
                '{"": 400}',
                '{"<a>": 4294967296}',
                '{"<a>": true}',
                '{"<a>": 5}',
                "{" + ", ".join(f'"<{i}>": {i}' for i in range(1000)) + "}",
            )
        )
    },
    **{
        f"decoder-{i}": raw("tokenizer_config.json", f'{{"added_tokens_decoder": {value}}}')
        for i, value in enumerate(
            (
                '{"a": {"content": "<a>"}}',
                '{"-1": {"content": "<a>"}}',
                '{"1.5": {"content": "<a>"}}',
                '{"²": {"content": "<a>"}}',
                '{"9": {"content": ""}}',
                '{"9": {"content": 5}}',
                '{"9": {}}',
                '{"9": null}',
                '{"9": "<a>"}',
                '{"' + "9" * 5000 + '": {"content": "<a>"}}',
                '{"4294967296": {"content": "<a>"}}',
                '{"9": {"content": "<a>", "special": "yes"}}',
                '{"9": {"content": "<a>", "normalized": 3}}',
                '{"9": {"content": "\\ud800"}}',
                '{"300": {"content": "the"}}',
            )
        )
    },
    **{
        f"templates-{i}": raw("tokenizer_config.json", f'{{"chat_template": {value}}}')
        for i, value in enumerate(
            (
                '[{"name": "default"}]',
                '[{"template": "a"}]',
                '["a"]',
                '[{"name": 1, "template": "a"}]',
                '[{"name": "default", "template": 1}]',
                '{"default": "a"}',
                '[{"name": "x\\u001b[31m", "template": "a"}]',
                json.dumps([{"name": "default", "template": "a" * 2_000_000}]),
                json.dumps([{"name": "a" * 1_000_000, "template": ""}]),
            )
        )
    },
    **{
        f"{name}-{i}": raw(name, value)
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
        for i, value in enumerate((DEEP, "[]", "", "5", "\xff", b"\xff", '{"a": ' + "1" * 5000 + "}"))
    },
    **{
        f"{name}-fifo": lambda folder, name=name: _fifo(folder, name)
        for name in ("tokenizer_config.json", "generation_config.json", "added_tokens.json", "chat_template.jinja")
    },
    **{
        f"{name}-endless": lambda folder, name=name: _linked(folder, name, "/dev/zero")
        for name in ("tokenizer_config.json", "generation_config.json", "added_tokens.json", "chat_template.jinja")
    },
    "jinja-large": raw("chat_template.jinja", "a" * 50_000_000),
    "jinja-bytes": raw("chat_template.jinja", b"\xff\xfe"),
    "class-flags-without-tokens": raw(
        "tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer", "add_eos_token": true}'
    ),
    "class-odd-token": raw("tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer", "bos_token": "$A"}'),
    "class-odd-bos": raw("tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer", "bos_token": ":"}'),
}

LOOP = "{% for i in range(99999) %}"


def _again(first: str, next_one: str) -> str:
    """Set a value from itself 99 times."""
    loop = "{% for i in range(99) %}{% set n.x = " + next_one + " %}{% endfor %}"
    return "{% set n = namespace(x=" + first + ") %}" + loop + "{{ n.x|length }}"


BOMBS: dict[str, str] = {
    "times": "{{ 'x' * 8000000000 }}",
    "ljust": "{{ 'a'.ljust(8000000000) }}",
    "center-method": "{{ 'a'.center(8000000000) }}",
    "zfill": "{{ 'a'.zfill(8000000000) }}",
    "expandtabs": "{{ '\\t'.expandtabs(2000000000) }}",
    "percent": "{{ '%8000000000d' % 1 }}",
    "percent-star": "{{ '%*d' % (8000000000, 1) }}",
    "format-method": "{{ '{:>8000000000}'.format(1) }}",
    "format-filter": "{{ '%8000000000d'|format(1) }}",
    "center": "{{ 'a'|center(8000000000) }}",
    "indent": "{{ 'a\nb'|indent(8000000000) }}",
    "tojson": "{{ [1]|tojson(indent=2000000000) }}",
    "tojson-separators": "{{ range(99999)|list|tojson(separators=('x' * 99999, ':')) }}",
    "list": "{{ [1] * 800000000 }}",
    "join": "{{ range(99999)|join('x' * 999999) }}",
    "replace": "{{ ('a' * 999999)|replace('a', 'b' * 999999) }}",
    "replace-method": "{{ ('a' * 999999).replace('', 'b' * 999999) }}",
    "translate": "{{ ('a' * 999999).translate({97: 'b' * 999999}) }}",
    "wordwrap": "{{ ('a ' * 99999)|wordwrap(1, wrapstring='x' * 99999) }}",
    "batch": "{{ [1]|batch(800000000, 0)|list }}",
    "slice": "{{ [1]|slice(800000000)|list }}",
    "lipsum": "{{ lipsum(n=10000000) }}",
    "doubled-text": _again("'ab'", "n.x ~ n.x"),
    "doubled-sum": _again("'ab'", "n.x + n.x"),
    "doubled-list": _again("[1]", "n.x + n.x"),
    "doubled-number": _again("'7'", "(n.x|int * n.x|int)|string"),
    "doubled-macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + _again("'ab'", "m(n.x)"),
    "nested-lists": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "kept": "{% set n = namespace(x=[]) %}" + LOOP + "{% set n.x = n.x + ['x' * 99999 ~ i] %}{% endfor %}",
    "power": "{{ 7 ** (10 ** 8) }}",
    "loops": LOOP * 2 + "{% endfor %}" * 2,
    "loops-in-filters": LOOP + "{{ range(99999)|sum }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "loop-recursion": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "output": LOOP + "{{ 'x' * 9999 }}{% endfor %}",
    "sort": LOOP + "{{ range(99999)|sort(reverse=true)|list|length }}{% endfor %}",
    "braces": "{" * 200_000,
    "brackets": "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "minus": "{{ " + "-" * 100_000 + "1 }}",
    "adds": "{{ " + "1 + " * 20_000 + "1 }}",
    "ifs": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "large": "a" * (1 << 21),
    "names": "".join(f"{{% set a{i} = 1 %}}" for i in range(30_000)) + "{{ 1 / 0 }}",
    "message": "{{ raise_exception('a\n\x1b[31m' * 100000) }}",
    "number-as-message": "{{ raise_exception(5) }}",
    "strftime": "{{ strftime_now('%Y' * 99999999) }}",
    "nothing-open": "{% endfor %}",
    "unknown-tag": "{% python %}",
    "unknown-filter": "{{ 1|nothing }}",
    "undefined": "{{ a.b.c }}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends '/etc/passwd' %}",
    "format-of-class": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "debug-tag": "{% debug %}",
    "zero": "{{ 1 / 0 }}",
}
ESCAPES = [
    "{{ messages.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages|attr('__class__') }}",
    "{{ messages['__class__'].x }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment.x }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ namespace.__init__.__globals__.os }}",
    "{{ lipsum.__globals__.os.popen('id') }}",
    "{{ lipsum['__globals__'].x }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ range.__class__.__base__ }}",
    "{{ dict.__base__.x }}",
    "{{ ''.format.__self__.__class__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ ('%s'|format)(1).__class__ }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ (messages|map(attribute='__class__')|list)[0].x }}",
    "{{ messages|map('attr', '__class__')|list|first + 1 }}",
    "{% set x = messages.__class__ %}{{ x }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ loop.__class__ }}{{ x.y }}",
    "{{ caller.__class__.x }}",
    "{{ import_module('os') }}",
]


def _row(**record: Any) -> bytes:
    return json.dumps(record).encode()


def _chat(*messages: Any, **more: Any) -> bytes:
    return _row(messages=list(messages), **more)


USER, SAYS = MESSAGES
PARTS: list[Any] = [
    5,
    None,
    "a",
    {},
    [],
    {"type": "image"},
    {"type": "image_url", "image_url": {"url": "x"}},
    {"type": "text"},
    {"type": "text", "text": 5},
    {"type": "a" * 10**6},
    {"type": ["text"]},
    {"type": "\x1b[31m\n", "text": "a"},
    {"type": "tool_use"},
]
ROWS: dict[str, bytes] = {
    "deep": b'{"messages": ' + b"[" * 200_000,
    "deep-900": b'{"messages": [{"role": "user", "content": "a", "x": ' + b"[" * 900 + b"]" * 900 + b'}, {"role": "assistant", "content": "b"}]}',
    "deep-tools": b'{"tools": ' + b"[" * 900 + b"]" * 900 + b', "messages": [{"role": "assistant", "content": "b"}]}',
    "digits": b'{"text": ' + b"1" * 5000 + b"}",
    "not-utf-8": b'{"text": "\xff"}',
    "half-a-pair": b'{"text": "\\ud800"}',
    "half-a-pair-in-chat": b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}',
    "key-1-mb": _row(**{"a" * 10**6: 1}),
    "key-escape": _row(**{"\x1b[31m\n": 1}),
    "keys-10000": _row(**{f"k{i}": 1 for i in range(10_000)}),
    **{f"content-part-{i}": _chat({"role": "user", "content": [part]}, SAYS) for i, part in enumerate(PARTS)},
    **{f"content-{i}": _chat({"role": "user", "content": value}, SAYS) for i, value in enumerate((5, True, {}, {"type": "text", "text": "a"}, 1e308))},
    **{f"role-{i}": _chat({"role": value, "content": "a"}, SAYS) for i, value in enumerate((5, None, [], {}, True))},
    **{f"weight-{i}": _chat(USER, SAYS | {"weight": value}) for i, value in enumerate((0, 0.5, -1, "0", [], {}, True, 1e308, 10**400))},
    **{f"train-{i}": _chat(USER, SAYS | {"train": value}) for i, value in enumerate((False, "no", [], 2, 0.0))},
    **{f"tools-{i}": _chat(USER, SAYS, tools=value) for i, value in enumerate((5, "x", "[1]", "[" * 100_000, [5], [[]], {}, {"a": 1}, True, "a" * 10**6))},
    "all-of-no-weight": _chat(USER, SAYS | {"weight": 0}, SAYS | {"train": False}),
    "calls-alone": _chat(USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}),
    "calls-odd": _chat(USER, {"role": "assistant", "content": None, "tool_calls": 5}),
    "messages-5": _row(messages=5),
    "messages-null-inside": _row(messages=[None]),
    "messages-empty": _row(messages=[]),
    "messages-list": _row(messages=[[]]),
    "message-escape": _chat({"\x1b[31m": "\n"}, SAYS),
    "message-1-mb": _chat({"a" * 10**6: "b"}, SAYS),
    "content-escape": _chat({"role": "user", "content": {"\x1b": "a" * 10**6}}, SAYS),
    "text-5": _row(text=5),
    "text-parts": _row(text=[{"type": "text", "text": "a"}]),
    "prompt-list": _row(prompt=[USER], completion=[SAYS]),
    "all": _row(text="a", prompt="a", completion="a", messages=[]),
    "array": b"[]",
    "nan": b"NaN",
    "zero-bytes": b"\0\0",
}  # fmt: skip


KINDS: dict[str, Mapping[str, Any]] = {
    "tokenizers": TOKENIZERS,
    "configs": CONFIGS,
    "templates": BOMBS | {f"escape-{i}": template for i, template in enumerate(ESCAPES)},
    "rows": ROWS,
}
"""By kind and name: what writes a folder, a template, or a line."""


def attempt(kind: str, case: Any, folder: Path) -> str | None:
    """Do with a case what a run and `generate` do. What is refused is a ValueError; the message, or None."""
    from adalomo_jax.finetune.documents import document_of, parse_record
    from adalomo_jax.pretrained import TextTokenizer, read_tokenizer

    try:
        if kind == "templates":
            tokenizer = TextTokenizer(byte_level(), eos=1, chat_template=case)
            text = tokenizer.prompt(MESSAGES[:1])
            assert not any(mark in text for mark in ("<class", "<module", "<function", "<bound", " at 0x")), text
            document_of({"messages": MESSAGES}, "a", tokenizer)
        elif kind == "rows":
            document_of(parse_record(case), "a", TextTokenizer(byte_level(), eos=1, chat_template=CHATML))
        else:
            folder.mkdir()
            case(folder)
            tokenizer = read_tokenizer(folder)
            encoded = tokenizer.encode([*TEXTS, *TEXTS[:1] * 50])
            tokenizer.decode(encoded[0].tokens.tolist() * 50)
            if tokenizer.chat_template is not None:
                tokenizer.prompt(MESSAGES[:1])
    except ValueError as error:
        return f"{error}"
    return None


def try_all(cases: list[tuple[str, str]], folder: Path, *, seconds: float = 60) -> dict[tuple[str, str], Any]:
    """What becomes of each case, by kind and name: a message, None where it is taken, or ``{"wrong": ...}``.

    They run in a process of bounded memory. A case that ends it, or that takes more than the seconds, is wrong.
    """
    found: dict[tuple[str, str], Any] = {}
    while left := [case for case in cases if case not in found]:
        command = [sys.executable, __file__, str(folder), *(f"{kind}/{name}" for kind, name in left)]
        with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err)
            end = _watched(process, out.name, seconds)
            out.seek(0), err.seek(0)
            lines, errors = out.read().split("\n")[:-1], err.read()
        for line in lines:
            kind, name, outcome = json.loads(line)
            found[kind, name] = outcome
        if still := [case for case in left if case not in found]:
            found[still[0]] = {"wrong": f"{end}: {errors[-300:]}"}
        elif "panicked" in errors or "Traceback" in errors:
            found["all", "standard error"] = {"wrong": errors[-300:]}
    return found


def _watched(process: subprocess.Popen, written: str, seconds: float) -> str:
    """How a process ended; it is ended where it writes nothing for so many seconds."""
    size = -1
    while os.path.getsize(written) != size:
        size = os.path.getsize(written)
        try:
            return f"status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            pass
    process.kill()
    process.wait()
    return "it hangs"


def main(folder: str, *cases: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with contextlib.suppress(ImportError):
        from adalomo_jax.pretrained.templates import LIMITS

        LIMITS["seconds"] = 1
    for i, case in enumerate(cases):
        kind, _, name = case.partition("/")
        try:
            outcome: Any = attempt(kind, KINDS[kind][name], Path(folder, f"{os.getpid()}-{i}"))
        except BaseException as error:
            outcome = {"wrong": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps([kind, name, outcome]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
