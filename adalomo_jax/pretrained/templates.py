"""Renders chat templates within bounds of time, memory and output.

A template is a program that somebody wrote. Jinja's sandbox keeps it from everything except its messages, but not from
``'x' * 8000000000`` or loops in loops. Too many things can lead to these for a list of them: filters, methods of
strings, powers, formats. So templates run in a process of their own, which the system bounds. Whatever they do, they
end, and the run reports one line. A row costs about 0.2 ms more than in this process, and the start costs 0.1 s, once.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LIMITS = {"seconds": 10, "memory": 1 << 31, "output": 1_000_000, "growth": 10}
"""The limits for one conversation: seconds of processor time; bytes of memory; characters of a text, and how many more
it may have for each character of the messages."""
MOST_BYTES = 1 << 20
"""The most bytes of a template. The largest published ones have a tenth of this."""
_PIECE = 1 << 16
"""How many characters of a message are turned into JSON at once."""
_STRIKES = 3
"""How often a template may break a bound before it is not run again: it might take long for each of many rows."""


class _Process:
    """A process that renders. It starts when it is first needed, and again after a template has ended it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.child: subprocess.Popen[bytes] | None = None
        self.owner = 0
        self.template: str | None = None

    def ask(self, template: str, conversation: list[bytes]) -> dict[str, Any]:
        """The process's answer to a conversation, which is JSON in pieces, or why the process ended."""
        with self.lock:
            try:
                self._send(self._started(), template, conversation)
                conversation.clear()  # otherwise memory would hold a long one and its texts
                reply = self._received()
            except BaseException:  # its answer would be taken for the next conversation's
                self.end()
                raise
            if reply is not None:
                return reply
            child = self.child
            self.end()
            return {"limit": _why(child.returncode if child else None)}

    def _send(self, child: subprocess.Popen[bytes], template: str, conversation: list[bytes]) -> None:
        assert child.stdin
        with contextlib.suppress(BrokenPipeError):  # the process has ended, and so does its output
            if template != self.template:
                child.stdin.write(json.dumps(template).encode() + b"\n")
                self.template = template
            child.stdin.writelines(conversation)
            child.stdin.write(b"\n")
            child.stdin.flush()

    def _received(self) -> dict[str, Any] | None:
        """The reply, with its texts; None if the process ended before the reply was complete."""
        assert self.child and self.child.stdout
        line = self.child.stdout.readline()
        if not line.endswith(b"\n"):
            return None
        reply = json.loads(line)
        texts = reply.get("texts", [])
        for i, text in enumerate(texts):
            if isinstance(text, dict):
                content = self.child.stdout.read(text["bytes"])
                if len(content) < text["bytes"]:
                    return None
                texts[i] = content.decode(errors="surrogatepass")
        return reply

    def end(self) -> None:
        """End the process, if there is one."""
        child, self.child, self.template = self.child, None, None
        if child is None or self.owner != os.getpid():
            return
        assert child.stdin and child.stdout
        with contextlib.suppress(OSError):
            child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1)
        child.kill()
        child.wait()
        child.stdout.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self.child is None or self.owner != os.getpid():  # a fork shares its parent's pipes
            script = Path(__file__).with_name("template_process.py")
            self.child = subprocess.Popen(
                [sys.executable, "-I", str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self.owner, self.template = os.getpid(), None
            assert self.child.stdin
            setup = {"limits": LIMITS, "path": [str(path) for path in sys.path]}
            self.child.stdin.write(json.dumps(setup).encode() + b"\n")
        return self.child


_process = _Process()
_strikes: Counter[str] = Counter()
atexit.register(_process.end)


class Rendered(NamedTuple):
    """The texts that a template writes."""

    text: str
    """The text of the first part."""
    marked: tuple[tuple[int, int], ...] | None
    """The characters of the text, from and to, that ``{% generation %}`` marks; None if a mark has no end."""
    others: tuple[str | int, ...]
    """The texts of the other parts; if the first text begins with one, it is given as its length."""


def render(
    template: str,
    messages: Iterable[Mapping[str, Any]],
    parts: Sequence[tuple[int, bool]],
    *,
    given: Mapping[str, Any],
    dated: bool = False,
) -> Rendered:
    """Render a conversation, and its beginnings, by a template.

    Args:
        template: the Jinja template.
        messages: JSON values. If this is an iterator, they are not kept while the template runs.
        parts: for each text, how many messages it has, and whether the start of an answer follows.
        given: the other variables that the template sees, JSON values.
        dated: whether the template may ask for the date, by ``strftime_now``.

    Raises:
        ValueError: the template refuses the messages, or breaks a bound.

    >>> render("{{ messages[0].content }}{{ '?' * n }}", [{"content": "Hi"}], [(1, False)], given={"n": 2}).text
    'Hi??'
    """
    if len(template) > MOST_BYTES:
        raise ValueError(f"a chat template must have at most {MOST_BYTES:,} characters, got {len(template):,}")
    if _strikes[template] >= _STRIKES:
        raise ValueError(f"the chat template has broken its bounds {_STRIKES} times: it is not tried again")
    if importlib.util.find_spec("jinja2") is None:
        raise ValueError("chat templates need the package jinja2: pip install 'adalomo-jax[finetune]'")
    if importlib.util.find_spec("resource") is None:
        raise ValueError(
            "chat templates are programs, and this system cannot bound them: use Linux, macOS, or on Windows WSL"
        )
    try:
        conversation = list(_request(messages, {"parts": parts, "given": given, "dated": dated}))
    except RecursionError:
        raise ValueError("messages have too many brackets inside each other") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"messages must be of JSON's types: {error}") from None
    try:
        reply = _process.ask(template, conversation)
    except OSError as error:
        raise ValueError(f"chat templates run in a process of their own, which cannot be started: {error}") from None
    if "limit" in reply:
        _strikes[template] += 1
        raise ValueError(f"the chat template breaks its bounds: {reply['limit']}")
    if "error" in reply:
        raise ValueError(f"the chat template refuses the messages: {reply['error']}")
    text, *others = reply["texts"]
    marked = reply["marked"]
    return Rendered(text, None if marked is None else tuple((begin, end) for begin, end in marked), tuple(others))


def _request(messages: Iterable[Mapping[str, Any]], others: Mapping[str, Any]) -> Iterator[bytes]:
    """JSON of the messages and the others, in pieces: no long content is held as a JSON string and as bytes at once."""
    yield json.dumps(others).encode().removesuffix(b"}") + b', "messages": ['
    for i, message in enumerate(messages):
        yield b", {" if i else b"{"
        for k, (field, value) in enumerate(message.items()):
            yield (b", " if k else b"") + _json(str(field)) + b": "
            if isinstance(value, str):
                yield b'"'
                yield from (_json(value[at : at + _PIECE])[1:-1] for at in range(0, len(value), _PIECE))
                yield b'"'
            else:
                yield _json(value)
        yield b"}"
    yield b"]}"


def _json(value: Any) -> bytes:
    """A value as JSON. Half a surrogate pair passes; the code that makes the text finds such errors."""
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")


def _why(status: int | None) -> str:
    """Why a process ended while it rendered a row."""
    import signal

    if status is not None and status == -getattr(signal, "SIGPROF", 0):
        return f"it takes more than {LIMITS['seconds']} seconds"
    return f"it ended the process that it ran in (status {status})"
