"""Broken and hostile tokenizers, configurations, chat templates and rows, and the outcome of each.

Run as a script, it tries one case after the other and prints a line of JSON for each.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hostile_templates import BOMBS, ESCAPES
from hostile_tokenizer_configs import CONFIGS
from hostile_tokenizers import TOKENIZERS
from small_tokenizers import CHATML, byte_level

MEMORY = 6 << 30
"""Bytes of address space for a process that tries cases; JAX alone reserves more than 1 GiB."""
MESSAGES = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "the mat"}]
TEXTS = ["the cat's 12 hats", "é 日本 \U0001f44d\0\ufffd ｱﬁ", "a" * 2_000 + "!", ""]


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
CONTENTS: list[Any] = [5, True, {}, {"type": "text", "text": "a"}, 1e308]
WEIGHTS: list[Any] = [0, 0.5, -1, "0", [], {}, True, 1e308, 10**400]
TOOLS: list[Any] = [5, "x", "[1]", "[" * 100_000, [5], [[]], {}, {"a": 1}, True, "a" * 10**6]
ROWS: dict[str, bytes] = {
    "deep": b'{"messages": ' + b"[" * 200_000,
    "deep-900": b'{"messages": [{"role": "assistant", "content": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}]}",
    "deep-tools": b'{"tools": ' + b"[" * 900 + b"]" * 900 + b', "messages": [{"role": "assistant", "content": "b"}]}',
    "digits": b'{"text": ' + b"1" * 5000 + b"}",
    "not-utf-8": b'{"text": "\xff"}',
    "half-a-pair": b'{"text": "\\ud800"}',
    "half-a-pair-in-chat": b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}',
    "key-1-mb": _row(**{"a" * 10**6: 1}),
    "key-escape": _row(**{"\x1b[31m\n": 1}),
    "keys-10000": _row(**{f"k{i}": 1 for i in range(10_000)}),
    **{f"content-part-{i}": _chat({"role": "user", "content": [part]}, SAYS) for i, part in enumerate(PARTS)},
    **{f"content-{i}": _chat({"role": "user", "content": value}, SAYS) for i, value in enumerate(CONTENTS)},
    **{f"role-{i}": _chat({"role": value, "content": "a"}, SAYS) for i, value in enumerate((5, None, [], {}, True))},
    **{f"weight-{i}": _chat(USER, SAYS | {"weight": value}) for i, value in enumerate(WEIGHTS)},
    **{f"train-{i}": _chat(USER, SAYS | {"train": value}) for i, value in enumerate((False, "no", [], 2, 0.0))},
    **{f"tools-{i}": _chat(USER, SAYS, tools=value) for i, value in enumerate(TOOLS)},
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
}

KINDS: dict[str, Mapping[str, Any]] = {
    "tokenizers": TOKENIZERS,
    "configs": CONFIGS,
    "templates": BOMBS | {f"escape-{i}": template for i, template in enumerate(ESCAPES)},
    "rows": ROWS,
}
"""Cases by kind and name: a function that writes a folder, a template, or a line."""


def attempt(kind: str, case: Any, folder: Path) -> str | None:
    """Use a case as a run and `generate` do. Return the message of the ValueError that refuses it, or None."""
    from adalomo_jax.pretrained import TextTokenizer, read_tokenizer
    from adalomo_jax.text.documents import document_of, parse_record

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
    """Return the outcome of each case, by kind and name: a message, None if accepted, or ``{"wrong": ...}``.

    The cases run in a process of bounded memory. A case that ends it, or takes longer than ``seconds``, is wrong.
    """
    found: dict[tuple[str, str], Any] = {}
    while left := [case for case in cases if case not in found]:
        command = [sys.executable, __file__, str(folder), *(f"{kind}/{name}" for kind, name in left)]
        with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err)
            end = _watched(process, out.name, seconds)
            out.seek(0)
            err.seek(0)
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
    """Return how a process ended; kill it if it writes nothing for this many seconds."""
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
