"""Documents: texts, and which parts of them are learned, made from the records that people write."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pydantic_core

from adalomo_jax.models.fields import shown
from adalomo_jax.pretrained.chat import handed_over, text_of
from adalomo_jax.pretrained.tokenizer import Tokenizer
from adalomo_jax.printable import printable
from adalomo_jax.text.records import FIELDS, KNOWN, alpaca, forms_in, kind_of, messages_of_sharegpt

NO_FORM = "must have one of"
"""How it is said that a record has no form, or several."""
NAMED = 3
"""How many of a kind a message names; it counts the rest."""
_SHOWN = 300
"""Most characters of a name in a message."""


class Document(NamedTuple):
    """A text that stands for itself: nothing in another one is predicted from it."""

    name: str
    """The place that it is from, without the folder's own path, so that it is the same on every machine."""
    text: str
    learned: tuple[tuple[int, int], ...] | None = None
    """The spans of characters that are predicted, each from and to; None for all of them and the document's end."""
    formatted: bool = False
    """A chat template has written the text with its special tokens: a tokenizer adds none."""
    unwritten: tuple[str, ...] = ()
    """Fields of the record that the chat template does not write: ``tools``, ``tool_calls``."""


class Broken(NamedTuple):
    """A record that is no document."""

    place: str
    """File and line."""
    reason: str


class PassedOver(NamedTuple):
    """A file of a folder, or a split of a data set, that is not read."""

    place: str
    reason: str


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are.

    >>> listed(["a", "b", "c", "d"])
    'a; b; c; and 1 more'
    """
    more = [f"and {len(names) - NAMED:,} more"] if len(names) > NAMED else []
    return "; ".join([*(printable(name[:_SHOWN]) for name in names[:NAMED]), *more])


def lines_of(passed_over: Iterable[PassedOver]) -> list[str]:
    """A line for each reason, so that many files of one kind do not hide the only one of another.

    >>> lines_of([PassedOver("a", "compressed"), PassedOver("b", "not text"), PassedOver("c", "compressed")])
    ['2 passed over (compressed): a; c', '1 passed over (not text): b']
    """
    places: dict[str, list[str]] = {}
    for place, reason in passed_over:
        places.setdefault(reason, []).append(place)
    return [f"{len(names):,} passed over ({reason}): {listed(names)}" for reason, names in places.items()]


def parse_record(line: bytes) -> Mapping[str, Any]:
    """The object on a line of JSON.

    Raises:
        ValueError: the line is not UTF-8, not JSON, or not an object.

    >>> parse_record(b'{"text": "To be"}')
    {'text': 'To be'}
    """
    try:
        record = _parsed(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start + 1} of the line") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at character {error.pos + 1} of the line") from error
    except RecursionError as error:
        raise ValueError("is JSON with too many brackets inside each other") from error
    except ValueError as error:
        raise ValueError("is JSON with a number of thousands of digits") from error
    if not isinstance(record, dict):
        raise ValueError(f"must be an object with {FIELDS}, got {kind_of(record)}")
    return record


def _parsed(line: bytes) -> Any:
    """Parses a line by Pydantic, which makes no text of it: that takes four bytes a character if one is an emoji.

    Python's own parser decides what is no JSON. It also reads halves of surrogate pairs and the like.
    """
    try:
        return pydantic_core.from_json(line, cache_strings="none")
    except ValueError:
        return json.loads(line.decode())


def document_of(record: Mapping[str, Any], name: str, tokenizer: Tokenizer) -> Document:
    """A record as a document. All of a ``text`` is learned, otherwise the completion or what the assistant says.

    Args:
        record: with ``text``, or ``prompt`` and ``completion`` (strings, joined as they are), or ``messages`` (a list
            of objects with the strings ``role`` and ``content``; a content may be a list of parts of text). With
            messages, ``tools`` is a list of objects, or JSON of one. A message with ``weight: 0`` or ``train: false``
            is not learned. ShareGPT's ``conversations`` are messages, too, and so are Alpaca's ``instruction``,
            ``input`` and ``output`` if there is a chat template. Fields that are None count as absent. Others do not
            matter.
        name: the document's name.
        tokenizer: its chat template is applied to messages.

    Raises:
        ValueError: the record has none or several of these, another type, an empty text or completion, half a
            surrogate pair, or a conversation in which the assistant says nothing or which the template refuses.

    >>> document_of({"prompt": "1 + 1 = ", "completion": "2"}, "sums", tokenizer=None)
    Document(name='sums', text='1 + 1 = 2', learned=((8, 9),), formatted=False, unwritten=())
    """
    record = {field: value for field, value in record.items() if value is not None}
    forms = forms_in(record)
    if len(forms) != 1:
        found = [field for field in KNOWN if field in record]
        raise ValueError(f"{NO_FORM} {FIELDS}, got {_named(sorted(found or record))}")
    if forms == [("conversations",)]:
        record["messages"] = messages_of_sharegpt(record.pop("conversations"), record.pop("system", None))
    elif forms == [("instruction", "output")]:
        record = alpaca(record, as_chat=tokenizer.has_chat_template)
    found = set(forms_in(record)[0])
    if found == {"text"}:
        document = Document(name, _string(record, "text"))
    elif found == {"prompt", "completion"}:
        prompt, completion = _string(record, "prompt", may_be_empty=True), _string(record, "completion")
        document = Document(name, prompt + completion, ((len(prompt), len(prompt) + len(completion)),))
    else:
        document = _conversation(record.pop("messages"), record.pop("tools", None), name, tokenizer)
        if not any(start < end for start, end in document.learned or ()):
            raise ValueError("has nothing that the assistant says, as the chat template writes it")
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"has half a surrogate pair (\\u{ord(document.text[error.start]):04x})") from error
    return document


def _conversation(messages: Any, tools: Any, name: str, tokenizer: Tokenizer) -> Document:
    messages, tools = _messages(messages), _tools(tools)
    calls_alone = [
        i for i, message in enumerate(messages, 1) if message.get("tool_calls") and is_blank(message["content"])
    ]
    given = handed_over(messages)  # so a long one is not in memory beside the text that the template writes
    chat = tokenizer.chat(given, tools=tools) if tools else tokenizer.chat(given)
    if calls_alone and "tool_calls" in chat.unwritten:
        raise ValueError(f"message {calls_alone[0]} has tool_calls alone, which the chat template does not write")
    return Document(name, chat.text, chat.learned, formatted=True, unwritten=chat.unwritten)


def _tools(tools: Any) -> list[Mapping[str, Any]] | None:
    """The tools that the assistant may call. Tables hold lists of unlike objects as JSON."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise ValueError("tools must be a list of objects, or JSON of one, got other text") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools must be a list of objects, got {shown(tools)}")
    return tools or None


def _messages(messages: Any) -> list[dict[str, Any]]:
    """The messages of a conversation, checked, without fields that are None and with contents as strings."""
    if not isinstance(messages, list):
        raise ValueError(f"messages must be a list, got {kind_of(messages)}")
    checked = [_message(i, message) for i, message in enumerate(messages, 1)]
    said = [message for message in checked if message["role"] == "assistant"]
    if not any(not is_blank(message["content"]) or message.get("tool_calls") for message in said):
        raise ValueError("must have a message of the role assistant that is not empty, or there is nothing to learn")
    return checked


def _message(i: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"message {i} must be an object, got {kind_of(message)}")
    message = {field: value for field, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list):
        try:
            content = text_of(content)
        except ValueError as error:
            raise ValueError(f"message {i}: {error}") from None
    elif content is None and message.get("tool_calls"):
        content = ""
    for field, value in (("role", message.get("role")), ("content", content)):
        if not isinstance(value, str):
            raise ValueError(f"message {i} must have a string {field}, got {kind_of(value)}")
    return message | {"content": content}


def is_blank(text: str) -> bool:
    """Whether a text is empty or white space. Unlike ``strip``, it makes no copy."""
    return not text or text.isspace()


def _named(fields: Sequence[str]) -> str:
    """The first fields of a record, each cut, and how many more there are."""
    more = [f"and {len(fields) - 2 * NAMED:,} more"] if len(fields) > 2 * NAMED else []
    names = [name if name.isidentifier() and len(name) < 40 else shown(name) for name in fields[: 2 * NAMED]]
    return ", ".join([*names, *more]) or "no fields"


def _string(record: Mapping[str, Any], field: str, may_be_empty: bool = False) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(f"{field} must be a string, got {kind_of(value)}")
    if is_blank(value) and not may_be_empty:
        raise ValueError(f"{field} is empty")
    return value
