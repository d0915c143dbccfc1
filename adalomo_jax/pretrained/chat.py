"""Conversations as text, by the template that a checkpoint brings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from adalomo_jax.models.fields import shown
from adalomo_jax.pretrained.template_process import CLOSE, OPEN
from adalomo_jax.pretrained.templates import render

_GENERATION_TAG = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")


class ChatText(NamedTuple):
    """A conversation as text. It has the special tokens already: encode it with ``add_special=False``."""

    text: str
    learned: tuple[tuple[int, int], ...]
    """The characters, from and to, that the assistant says (with its end-of-turn token)."""
    unwritten: tuple[str, ...] = ()
    """What the conversation has and the template does not write: ``tools``, ``tool_calls``."""


def chat_text(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> ChatText:
    r"""What ``apply_chat_template`` of Hugging Face's transformers renders, and what of it the assistant says.

    Where the template marks it by ``{% generation %}``, the marked text is learned as it is. Elsewhere it is what an
    assistant's message adds to the messages before it and the generation prompt: what a model has to write there. It
    includes the end-of-turn token; white space after that one is not learned if the token is ``eos_token``, at which
    generation ends. A message with ``weight: 0`` or ``train: false`` is not learned; templates do not see these fields.

    Templates are not told the date (``strftime_now`` is not defined, and they write one of their own): a run that is
    continued on another day has to see the same text.

    Args:
        template: the Jinja template. It runs in a sandbox, within bounds; see `templates.render`.
        messages: each with a ``role`` and mostly a ``content``; what else the template reads is passed on. A content
            may be a list of parts, which are joined: ``{"type": "text", "text": ...}``.
        tools: what the assistant may call, for the template.
        bos_token: the token that starts a text, for the template.
        eos_token: the token that ends one, for the template.

    Raises:
        ValueError: no messages, one without a role or content, or with parts other than text; a template that is none,
            that refuses the messages or takes too much, or one that writes messages differently when others follow, so
            that it cannot be told who says what.

    >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    >>> template += "{% if add_generation_prompt %}assistant: {% endif %}"
    >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    >>> chat = chat_text(template, messages, eos_token="</s>")
    >>> [chat.text[start:end] for start, end in chat.learned]
    ['Hello!</s>']
    """
    seen = _as_seen(messages)
    given = _given(tools, bos_token, eos_token)
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    is_learned = [_is_learned(i, messages[i]) for i in said]
    if _GENERATION_TAG.search(template):
        marked = _marked(next(render(template, seen, [(len(seen), False)], given=given)))
        chat = marked if all(is_learned) else _without(marked, is_learned)
        return chat._replace(unwritten=_unwritten(template, seen, tools))
    said = [i for i, learned in zip(said, is_learned) if learned]
    parts = [(len(seen), False), *(part for i in said for part in ((i, True), (i + 1, False)))]
    texts = render(template, seen, parts, given=given)
    full = next(texts)
    learned = tuple(_added(i, next(texts), next(texts), full, eos_token) for i in said)
    return ChatText(full, learned, _unwritten(template, seen, tools))


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
    given = _given(None, bos_token, eos_token)
    text = next(render(template, _as_seen(messages), [(len(messages), True)], given=given, dated=True))
    return text.replace(OPEN, "").replace(CLOSE, "")


def text_of(content: Any) -> str:
    """A message's content as text: a list of parts is joined.

    Raises:
        ValueError: neither, or a part that is no text.

    >>> text_of([{"type": "text", "text": "To be"}, {"type": "text", "text": ", or not"}])
    'To be, or not'
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"content must be a string or a list of parts, got {shown(content)}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise ValueError(
                f"content must have parts of the type 'text' alone, got {shown(part if kind is None else kind)}"
            )
        if not isinstance(part.get("text"), str):
            raise ValueError(f"a part of the type 'text' must have a string text, got {shown(part)}")
    return "".join(part["text"] for part in content)


def _given(tools: Sequence[Mapping[str, Any]] | None, bos_token: str | None, eos_token: str | None) -> dict[str, Any]:
    """What a template sees besides messages."""
    given: dict[str, Any] = {"tools": None if tools is None else list(tools), "documents": None}
    return given | {
        name: text for name, text in (("bos_token", bos_token), ("eos_token", eos_token)) if text is not None
    }


def _unwritten(template: str, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[str, ...]:
    """A template that does not name a field cannot write it."""
    has = {"tools": bool(tools), "tool_calls": any(message.get("tool_calls") for message in messages)}
    return tuple(field for field, is_there in has.items() if is_there and not re.search(rf"\b{field}\b", template))


def _as_seen(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as a template sees them."""
    if not messages:
        raise ValueError("a conversation needs at least one message, got none")
    seen = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} needs a role, such as 'user', got {shown(message)}")
        if message.get("content") is None and "tool_calls" not in message:
            raise ValueError(f"message {i} needs a content, got {shown(message)}")
        one = {field: value for field, value in message.items() if field not in ("weight", "train")}
        if isinstance(one.get("content"), list):
            try:
                one["content"] = text_of(one["content"])
            except ValueError as error:
                raise ValueError(f"message {i}: {error}") from None
        seen.append(one)
    return seen


def _is_learned(i: int, message: Mapping[str, Any]) -> bool:
    """Whether what it says is learned: ``weight`` is OpenAI's field, ``train`` that of other formats."""
    for field in ("weight", "train"):
        value = message.get(field)
        if value is not None and (not isinstance(value, int | float) or value not in (0, 1)):
            raise ValueError(f"message {i} must have a {field} of 0 or 1, or of false or true, got {shown(value)}")
        if value is not None and not value:
            return False
    return True


def _added(i: int, prompt: str, through: str, full: str, eos_token: str | None) -> tuple[int, int]:
    """The characters that message ``i`` adds to those before it and the prompt for an answer."""
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
    learned, marks, at = [], 0, 0
    while (start := rendered.find(OPEN, at)) >= 0 and (at := rendered.find(CLOSE, start)) >= 0:
        begin = start - marks
        marks += len(OPEN) + len(CLOSE)
        at += len(CLOSE)
        learned.append((begin, at - marks))
    text = rendered.replace(OPEN, "").replace(CLOSE, "")
    if len(text) != len(rendered) - marks:
        raise ValueError("the chat template leaves a {% generation %} block before its end; what is learned is unclear")
    return ChatText(text, tuple(learned))


def _without(chat: ChatText, is_learned: Sequence[bool]) -> ChatText:
    """What the template marked, of the messages that are learned."""
    if len(chat.learned) != len(is_learned):
        raise ValueError(
            f"some of the assistant's messages are not to be learned (weight or train), and the chat template marks "
            f"{len(chat.learned)} blocks of {len(is_learned)} messages: which are theirs cannot be told"
        )
    return chat._replace(learned=tuple(span for span, learned in zip(chat.learned, is_learned) if learned))
