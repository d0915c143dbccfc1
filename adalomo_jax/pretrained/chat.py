"""Conversations as text, by the template that a checkpoint brings."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    import jinja2

_OPEN, _CLOSE = "\0<generation>\0", "\0</generation>\0"
"""What the generation tag leaves around its body in the rendered text, until the spans are read off."""
_GENERATION_TAG = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")


class ChatText(NamedTuple):
    """A conversation as text. It has the special tokens already: encode it with ``add_special=False``."""

    text: str
    learned: tuple[tuple[int, int], ...]
    """The characters, from and to, that the assistant says (with its end-of-turn token)."""


def chat_text(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> ChatText:
    r"""What ``apply_chat_template`` of Hugging Face's transformers renders, and what of it the assistant says.

    Where the template marks it by ``{% generation %}``, the marked text is learned as it is. Elsewhere it is what an
    assistant's message adds to the messages before it and the generation prompt: what a model has to write there. It
    includes the end-of-turn token; white space after that one is not learned if the token is ``eos_token``, at which
    generation ends.

    Templates are not told the date (``strftime_now`` is not defined, and they write one of their own): a run that is
    continued on another day has to see the same text.

    Args:
        template: the Jinja template. It runs in a sandbox.
        messages: each with a ``role`` and mostly a ``content``; what else the template reads is passed on.
        bos_token: the token that starts a text, for the template.
        eos_token: the token that ends one, for the template.

    Raises:
        ValueError: no messages, one without a role or content, a template that is none or that refuses the messages,
            or one that writes messages differently when others follow, so that it cannot be told who says what.

    >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    >>> template += "{% if add_generation_prompt %}assistant: {% endif %}"
    >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    >>> text, learned = chat_text(template, messages, eos_token="</s>")
    >>> [text[start:end] for start, end in learned]
    ['Hello!</s>']
    """
    render = _renderer(template, messages, bos_token, eos_token)
    if _GENERATION_TAG.search(template):
        return _marked(render(messages))
    full = render(messages)
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return ChatText(full, tuple(_added_by(i, messages, full, render, eos_token) for i in said))


def chat_prompt(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> str:
    """The messages and the start of the assistant's answer to them: what a model is to continue.

    Args and errors are those of ``chat_text``. The template may write today's date.
    """
    render = _renderer(template, messages, bos_token, eos_token, strftime_now=datetime.datetime.now().strftime)
    text = render(messages, add_generation_prompt=True)
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def _renderer(
    template: str, messages: Sequence[Mapping[str, Any]], bos_token: str | None, eos_token: str | None, **more: Any
):
    """A function of messages: all texts that one makes have the same special tokens."""
    _check(messages)
    given: dict[str, Any] = {"tools": None, "documents": None, **more}
    given |= {name: token for name, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token is not None}

    def render(messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        try:
            compiled = _compile(template)
            return compiled.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **given)
        except Exception as error:  # a template is a program: it may fail as any
            raise ValueError(f"the chat template refuses the messages: {_one_line(error)}") from error

    return render


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise ValueError("a conversation needs at least one message, got none")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} needs a role, such as 'user', got {_short(message)}")
        if message.get("content") is None and "tool_calls" not in message:
            raise ValueError(f"message {i} needs a content, got {_short(message)}")


def _added_by(
    i: int, messages: Sequence[Mapping[str, Any]], full: str, render: Any, eos_token: str | None
) -> tuple[int, int]:
    """The characters that message ``i`` adds to those before it and the prompt for an answer."""
    prompt = render(messages[:i], add_generation_prompt=True)
    through = full if i == len(messages) - 1 else render(messages[: i + 1])
    if not through.startswith(prompt) or not full.startswith(through):
        raise ValueError(
            f"what the assistant says in message {i} cannot be told apart: the chat template writes messages "
            "differently when others follow; give a template that marks what is learned by {% generation %}"
        )
    end = len(through)
    if eos_token and through.rstrip().endswith(eos_token):
        end = len(through.rstrip())
    return len(prompt), max(end, len(prompt))


def _marked(rendered: str) -> ChatText:
    """The text without the marks of the generation tag, and what stood between them."""
    parts = re.split(f"{re.escape(_OPEN)}(.*?){re.escape(_CLOSE)}", rendered, flags=re.DOTALL)
    text, learned = "", []
    for i, part in enumerate(parts):
        if i % 2:
            learned.append((len(text), len(text) + len(part)))
        text += part
    if _OPEN in text or _CLOSE in text:
        raise ValueError("the chat template leaves a {% generation %} block before its end; what is learned is unclear")
    return ChatText(text, tuple(learned))


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
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
            return [mark(_OPEN), nodes.Scope(body, lineno=line), mark(_CLOSE)]

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment.from_string(template)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
