"""JSON files of people's models, read within bounds, and checked against the types and ranges of their fields."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

MOST_BYTES = 1 << 30
"""No file that describes a model is larger: an index of a million tensors has a tenth of it."""
_SHOWN = 60
"""Characters of a value in a message."""

_Fields = TypeVar("_Fields", bound="Fields")


class Fields(BaseModel):
    """What a file may say, by name: subclasses have the types and ranges. Names that they have not do not matter.

    Types are meant as they are written: no string is taken for a number, no ``true`` for 1. Numbers are finite.

    Example:
        >>> from pydantic import Field
        >>> class Sizes(Fields):
        ...     layers: int = Field(ge=1)
        >>> check(Sizes, {"layers": 3, "name": "x"}, "config.json").layers
        3
        >>> check(Sizes, {"layers": "3"}, "config.json")
        Traceback (most recent call last):
        ValueError: config.json: layers must be a valid integer, got '3'
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())


def check(fields: type[_Fields], contents: Mapping[str, Any], place: str) -> _Fields:
    """The contents of a file as the fields that it may have.

    Raises:
        ValueError: one line with ``place``, the first field that is wrong, its value, and what is allowed.
    """
    try:
        return fields.model_validate(dict(contents))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = _name(first["loc"], contents)
        if first["type"] == "missing":
            raise ValueError(f"{place}: {name} is missing") from None
        allowed = re.sub(r"^(Value error,|(Input|\w+) should) ?", "must ", first["msg"])
        raise ValueError(f"{place}: {name} {allowed}, got {shown(first['input'])}") from None


def _name(parts: Sequence[str | int], contents: Any) -> str:
    """Of a field within fields: ``rope_scaling.factor``, ``eos_token_id[1]``. Of a union pydantic adds the types."""
    name = ""
    for part in parts:
        try:
            contents = contents[part]
        except (LookupError, TypeError):
            if isinstance(contents, Mapping) and part == parts[-1]:
                name += f".{part}"  # what is missing
            continue
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    return name.lstrip(".")


def shown(value: Any) -> str:
    """A value in a message: on one line, without what a terminal obeys, and not all of a long one.

    >>> shown("a" * 100), shown("a\\x1bb")
    ("'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...", "'a\\\\x1bb'")
    """
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**_SHOWN else "a number of many digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ValueError: it is missing or unreadable, no regular file, too large, or holds no JSON object.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a regular file")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path} must have at most {MOST_BYTES:,} bytes, got {path.stat().st_size:,}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} cannot be read: it is JSON with too many brackets inside each other") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found
