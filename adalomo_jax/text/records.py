"""The forms in which people write records, as the fields that `document_of` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FIELDS = "text, prompt and completion, or messages"
"""A record has one of these, or one of other tools' forms."""
OURS = (("text",), ("prompt", "completion"), ("messages",))
FORMS = (*OURS, ("conversations",), ("instruction", "output"))
"""The fields that each form must have: ours, ShareGPT's and Alpaca's."""
FURTHER = ("tools", "input", "system")
"""Fields that belong to some forms, and may be missing."""
KNOWN = tuple(field for form in FORMS for field in form)
_ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"},
    **{"bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system"},
    **{"tool": "tool", "observation": "tool", "function_response": "tool"},
}
"""The names by which ShareGPT's records call the roles."""
_ALPACA = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The prompt that Alpaca was trained with, https://github.com/tatsu-lab/stanford_alpaca."""
_CONTEXT = ", paired with an input that provides further context"


def forms_in(fields: Sequence[str] | Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The forms whose fields are all there.

    Those of another tool do not count beside one of ours: Alpaca's own records have ``text``, too.
    """
    found = [form for form in FORMS if all(field in fields for field in form)]
    ours = [form for form in found if form in OURS]
    return ours or found


def columns_of(names: Sequence[str], chosen: Mapping[str, str]) -> list[str]:
    """The columns of a table that may be read; empty if no form is complete."""
    if not (set(chosen.values()) <= {*names} if chosen else forms_in(names)):
        return []
    read = {*(chosen.values() or KNOWN), *FURTHER}
    return [name for name in names if name in read]


def renamed(record: Mapping[str, Any], chosen: Mapping[str, str]) -> Mapping[str, Any]:
    """The record with the chosen columns alone, under our names, and what may belong to them."""
    if not chosen:
        return record
    missing = [column for column in chosen.values() if column not in record]
    if missing:
        raise ValueError(f"must have the columns {', '.join(chosen.values())} of --columns, lacks {missing[0]}")
    further = {field: record[field] for field in FURTHER if field in record}
    return further | {field: record[column] for field, column in chosen.items()}


def messages_of_sharegpt(conversations: Any, system: Any = None) -> list[dict[str, Any]]:
    """ShareGPT's ``conversations``, objects with ``from`` and ``value``, as ``messages``.

    >>> messages_of_sharegpt([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    if not isinstance(conversations, list):
        raise ValueError(f"conversations must be a list, got {kind_of(conversations)}")
    messages = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    for i, turn in enumerate(conversations, 1):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {i} of conversations must be an object, got {kind_of(turn)}")
        if "role" in turn:  # some keep our form under their name
            messages.append(dict(turn))
            continue
        role = _ROLES.get(str(turn.get("from")))
        if role is None:
            raise ValueError(f"turn {i} of conversations must be from {', '.join(_ROLES)}, got {turn.get('from')!r}")
        kept = {field: turn[field] for field in ("weight", "train") if field in turn}
        messages.append({"role": role, "content": turn.get("value")} | kept)
    return messages


def alpaca(record: Mapping[str, Any], *, as_chat: bool) -> dict[str, Any]:
    """Alpaca's ``instruction``, ``input`` and ``output`` as messages, or with Alpaca's own prompt.

    >>> alpaca({"instruction": "Add.", "input": "1 1", "output": "2"}, as_chat=True)["messages"][0]["content"]
    'Add.\\n\\n1 1'
    """
    texts = {field: record.get(field) for field in ("instruction", "input", "output")}
    for field, value in texts.items():
        if not (isinstance(value, str) or (field == "input" and value is None)):
            raise ValueError(f"{field} must be a string, got {kind_of(value)}")
    instruction, given, output = texts["instruction"], (texts["input"] or "").strip(), texts["output"]
    if as_chat:
        user = f"{instruction}\n\n{given}" if given else instruction
        return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": output}]}
    of_input = {"context": _CONTEXT, "input": f"### Input:\n{given}\n\n"} if given else {"context": "", "input": ""}
    return {"prompt": _ALPACA.format(instruction=instruction, **of_input), "completion": output}


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "nothing"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
