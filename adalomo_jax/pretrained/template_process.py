"""The process in which chat templates run: a script that needs only the standard library and Jinja; see `templates`.

It reads lines of JSON: the bounds, then templates, each followed by its conversations. It answers each conversation by
a line of JSON, followed by the raw texts, and ends with its input.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

OPEN, CLOSE = "\0<generation>\0", "\0</generation>\0"
"""Marks that the generation tag leaves around its body, until the body's place in the text is known."""
_SHOWN = 200
"""The most characters shown of a template's own error."""


class TooMuch(Exception):
    """A bound is broken."""


def answer(template: str, line: bytes, limits: Mapping[str, Any]) -> dict[str, Any]:
    """The texts that a line asks for, or why there are none; ``limit`` if a bound is broken."""
    try:
        texts, marked = _render(template, json.loads(line), len(line), limits)
        return {"texts": texts, "marked": marked}
    except TooMuch as error:
        return {"limit": str(error)}
    except MemoryError:
        return {"limit": f"it takes more than {limits['memory'] >> 20:,} MB of memory"}
    except RecursionError:
        return {"error": "it calls itself without end, or the messages have too many brackets inside each other"}
    except Exception as error:  # a template is a program and may raise anything
        return {"error": _one_line(error)}


def _render(
    template: str, request: Mapping[str, Any], size: int, limits: Mapping[str, Any]
) -> tuple[list[str | int], list[tuple[int, int]] | None]:
    """The texts, and the characters that the template marks in the first; None if a mark has no end.

    If the first text begins with another, that one is given as its length. Otherwise long conversations would be
    written many times.
    """
    messages, given = request["messages"], dict(request["given"])
    if request["dated"]:
        given["strftime_now"] = datetime.datetime.now().strftime
    room = limits["output"] + limits["growth"] * size
    compiled = _compile(template)
    texts: list[str | int] = []
    first, marked = None, None
    for count, is_prompt in request["parts"]:
        pieces, length = [], 0
        for piece in compiled.generate(messages=messages[:count], add_generation_prompt=is_prompt, **given):
            pieces.append(piece)
            length += len(piece)
            if length > room:
                raise TooMuch(f"it writes more than {room:,} characters of messages of {size:,}")
        text, of_text = _without_marks("".join(pieces))
        texts.append(text if first is None or not first.startswith(text) else len(text))
        if first is None:
            first, marked = text, of_text
    return texts, marked


def _without_marks(rendered: str) -> tuple[str, list[tuple[int, int]] | None]:
    """A text without the marks of the generation tag, and the characters, from and to, between them."""
    between, marks, at = [], 0, 0
    while (start := rendered.find(OPEN, at)) >= 0 and (at := rendered.find(CLOSE, start)) >= 0:
        begin = start - marks
        marks += len(OPEN) + len(CLOSE)
        at += len(CLOSE)
        between.append((begin, at - marks))
    text = rendered.replace(OPEN, "").replace(CLOSE, "")
    return text, between if len(text) == len(rendered) - marks else None


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    """The template, in the environment that Hugging Face's transformers gives it."""
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """``{% generation %}...{% endgeneration %}``: its body, between marks."""

        tags = {"generation"}

        def parse(self, parser: Any) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            mark = lambda text: nodes.Output([nodes.TemplateData(text)], lineno=line)
            return [mark(OPEN), nodes.Scope(body, lineno=line), mark(CLOSE)]

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment.from_string(template)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    """The ``tojson`` filter without the HTML escapes of Jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _one_line(error: Exception) -> str:
    """An error's text, cut, and without terminal control characters."""
    text = " ".join(str(error)[: 10 * _SHOWN].split()) or type(error).__name__
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def main() -> None:
    """Answer the lines of standard input. The first one has the bounds and the path of Jinja."""
    setup = json.loads(sys.stdin.buffer.readline())
    limits = setup["limits"]
    sys.path[:] = setup["path"]
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401  (all imports before the bounds, which are for templates alone)

    restart = _bounded(limits)
    template = ""
    for line in sys.stdin.buffer:
        restart()
        if line.startswith(b'"'):
            template = json.loads(line)
            continue
        try:
            written = _as_lines(answer(template, line, limits))
        except MemoryError:
            written = _as_lines({"limit": f"it takes more than {limits['memory'] >> 20:,} MB of memory"})
        sys.stdout.buffer.writelines(written)
        sys.stdout.buffer.flush()


def _as_lines(reply: Mapping[str, Any]) -> list[bytes]:
    """A reply as a line of JSON, which has the sizes of the texts in their place, and then the texts."""
    texts = [text if isinstance(text, int) else text.encode(errors="surrogatepass") for text in reply.get("texts", [])]
    sizes = [text if isinstance(text, int) else {"bytes": len(text)} for text in texts]
    line = json.dumps({**reply, "texts": sizes} if texts else dict(reply))
    return [line.encode() + b"\n", *(text for text in texts if isinstance(text, bytes))]


def _bounded(limits: Mapping[str, Any]) -> Any:
    """Bound the process; returns a function that restarts its time."""
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which then ends this input
    # The parent process may have ignored or blocked this signal.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    for name, limit in {"RLIMIT_AS": limits["memory"], "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a lower limit is already set
            resource.setrlimit(getattr(resource, name), (limit, limit))
    # Processor time, so that a busy or sleeping machine makes no template slow. The signal ends the process.
    return lambda: signal.setitimer(signal.ITIMER_PROF, limits["seconds"])


if __name__ == "__main__":
    main()
