"""Renders conversations as text, by a checkpoint's chat template."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from adalomo_jax.models.fields import shown
from adalomo_jax.pretrained.templates import render

_GENERATION_TAG = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")


class ChatText(NamedTuple):
    """A conversation as text. It already has the special tokens: encode it with ``add_special=False``."""

    text: str
    learned: tuple[tuple[int, int], ...]
    """The characters, from and to, that the assistant says (with its end-of-turn token)."""
    unwritten: tuple[str, ...] = ()
    """The fields that the conversation has and the template does not write: ``tools``, ``tool_calls``."""


def chat_text(
    template: str,
    messages: Iterable[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> ChatText:
    r"""Render the text of ``apply_chat_template`` of Hugging Face's transformers, and find what the assistant says.

    If the template marks this by ``{% generation %}``, the marked text is learned as it is. Otherwise the learned text
    is what an assistant's message adds to the messages before it and the generation prompt: what a model has to write
    there. It includes the end-of-turn token. If that token is ``eos_token``, at which generation ends, white space
    after it is not learned. A message with ``weight: 0`` or ``train: false`` is not learned; templates do not see these
    fields.

    Templates cannot ask for the date (``strftime_now`` is not defined, and they write one of their own), because a run
    that continues on another day must see the same text.

    Args:
        template: the Jinja template. It runs in a sandbox, within bounds; see `templates.render`.
        messages: each with a ``role`` and usually a ``content``; other fields are passed on to the template. A content
            may be a list of parts, which are joined: ``{"type": "text", "text": ...}``. If this is an iterator, the
            messages are not kept while the template runs.
        tools: the tools that the assistant may call, for the template.
        bos_token: the token that starts a text, for the template.
        eos_token: the token that ends a text, for the template.

    Raises:
        ValueError: there are no messages, one has no role or content, or parts other than text; or the template is
            invalid, refuses the messages, takes too much, or writes messages differently when others follow, so that
            it is unclear who says what.

    >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    >>> template += "{% if add_generation_prompt %}assistant: {% endif %}"
    >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    >>> chat = chat_text(template, messages, eos_token="</s>")
    >>> [chat.text[start:end] for start, end in chat.learned]
    ['Hello!</s>']
    """
    seen, said = _as_seen(messages)
    count, given = len(seen), _given(tools, bos_token, eos_token)
    unwritten = _unwritten(template, seen, tools)
    is_marked = _GENERATION_TAG.search(template) is not None
    learned = [i for i, is_learned in said.items() if is_learned and not is_marked]
    parts = [part for i in learned for part in ((i, True), (i + 1, False))]
    text, marked, others = render(template, handed_over(seen), [(count, False), *parts], given=given)
    if is_marked:
        return ChatText(text, _learned_of(marked, list(said.values())), unwritten)
    of_each = zip(learned, others[::2], others[1::2], strict=True)
    added = tuple(_added(i, prompt, through, text, eos_token) for i, prompt, through in of_each)
    return ChatText(text, added, unwritten)


def chat_prompt(
    template: str,
    messages: Iterable[Mapping[str, Any]],
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> str:
    """The messages and the start of the assistant's answer to them: the text that a model continues.

    Args and errors are those of ``chat_text``. The template may write today's date.
    """
    seen, _ = _as_seen(messages)
    given = _given(None, bos_token, eos_token)
    return render(template, seen, [(len(seen), True)], given=given, dated=True).text


def handed_over(messages: list[Any]) -> Iterator[Any]:
    """Take each message out of the list: whoever receives it is the only one that holds it, so long ones can go."""
    messages.reverse()  # the last one comes out of a list at once, the first one only past all others
    while messages:
        yield messages.pop()


def text_of(content: Any) -> str:
    """A message's content as text: a list of parts is joined.

    Raises:
        ValueError: the content is neither text nor such a list, or a part is not text.

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
    """The variables that a template sees besides messages."""
    given: dict[str, Any] = {"tools": None if tools is None else list(tools), "documents": None}
    return given | {
        name: text for name, text in (("bos_token", bos_token), ("eos_token", eos_token)) if text is not None
    }


def _unwritten(template: str, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[str, ...]:
    """The fields that the template cannot write, because it does not name them."""
    has = {"tools": bool(tools), "tool_calls": any(message.get("tool_calls") for message in messages)}
    return tuple(field for field, is_there in has.items() if is_there and not re.search(rf"\b{field}\b", template))


def _as_seen(messages: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[int, bool]]:
    """The messages as a template sees them, and for each of the assistant's whether it is learned."""
    seen, said = [], {}
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} needs a role, such as 'user', got {shown(message)}")
        if message.get("content") is None and "tool_calls" not in message:
            raise ValueError(f"message {i} needs a content, got {shown(message)}")
        if message["role"] == "assistant":
            said[i] = _is_learned(i, message)
        one = {field: value for field, value in message.items() if field not in ("weight", "train")}
        if isinstance(one.get("content"), list):
            try:
                one["content"] = text_of(one["content"])
            except ValueError as error:
                raise ValueError(f"message {i}: {error}") from None
        seen.append(one)
    if not seen:
        raise ValueError("a conversation needs at least one message, got none")
    return seen, said


def _is_learned(i: int, message: Mapping[str, Any]) -> bool:
    """Whether a message is learned: ``weight`` is OpenAI's field, ``train`` that of other formats."""
    for field in ("weight", "train"):
        value = message.get(field)
        if value is not None and (not isinstance(value, int | float) or value not in (0, 1)):
            raise ValueError(f"message {i} must have a {field} of 0 or 1, or of false or true, got {shown(value)}")
        if value is not None and not value:
            return False
    return True


def _added(i: int, prompt: str | int, through: str | int, full: str, eos_token: str | None) -> tuple[int, int]:
    """The characters that message ``i`` adds to the ones before it and the generation prompt; see `Rendered.others`."""
    if isinstance(prompt, str) or isinstance(through, str) or prompt > through:
        raise ValueError(
            f"what the assistant says in message {i} cannot be told apart: the chat template writes messages "
            "differently when others follow; give a template that marks what is learned by {% generation %}"
        )
    end = through
    while end and full[end - 1].isspace():
        end -= 1
    ends = eos_token and full.endswith(eos_token, 0, end)
    return prompt, max(end if ends else through, prompt)


def _learned_of(marked: tuple[tuple[int, int], ...] | None, is_learned: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    """The marked characters of the messages that are learned."""
    if marked is None:
        raise ValueError("the chat template leaves a {% generation %} block before its end; what is learned is unclear")
    if all(is_learned):
        return marked
    if len(marked) != len(is_learned):
        raise ValueError(
            f"some of the assistant's messages are not to be learned (weight or train), and the chat template marks "
            f"{len(marked)} blocks of {len(is_learned)} messages: it is unclear which blocks are theirs"
        )
    return tuple(span for span, learned in zip(marked, is_learned) if learned)
