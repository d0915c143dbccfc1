"""Functions that write folders with a good tokenizer.json and broken or hostile files beside it."""

import json
from collections.abc import Callable
from pathlib import Path

from hostile_tokenizers import DEEP, fifo, linked, raw

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
    "add_prefix_space",
    "pad_token",
    "additional_special_tokens",
    "extra_special_tokens",
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
        f"map-{field}-{i}": raw("special_tokens_map.json", f'{{"{field}": {value}}}')
        for field in ("eos_token", "cls_token", "additional_special_tokens")
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
        f"{name}-fifo": lambda folder, name=name: fifo(folder, name)
        for name in ("tokenizer_config.json", "generation_config.json", "added_tokens.json", "chat_template.jinja")
    },
    **{
        f"{name}-endless": lambda folder, name=name: linked(folder, name, "/dev/zero")
        for name in ("tokenizer_config.json", "generation_config.json", "added_tokens.json", "chat_template.jinja")
    },
    "jinja-large": raw("chat_template.jinja", "a" * 50_000_000),
    "jinja-bytes": raw("chat_template.jinja", b"\xff\xfe"),
    "class-flags-without-tokens": raw(
        "tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer", "add_eos_token": true}'
    ),
    "class-odd-token": raw("tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer", "bos_token": "$A"}'),
    "decoder-20000": raw(
        "tokenizer_config.json",
        json.dumps({"added_tokens_decoder": {str(i): {"content": f"<{i}>"} for i in range(291, 20_000)}}),
    ),
    "class-odd-bos": raw("tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer", "bos_token": ":"}'),
}
