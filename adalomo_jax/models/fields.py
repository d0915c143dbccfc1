"""The fields that a file may have, with types and ranges; and how messages show values from such files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from adalomo_jax.printable import printable

_SHOWN = 60
"""The most characters of a value in a message."""

_Fields = TypeVar("_Fields", bound="Fields")


class Fields(BaseModel):
    """The fields that a file may have. Subclasses give names, types and ranges; other names are ignored.

    Types are strict: a string does not count as a number, nor ``true`` as 1. Numbers are finite.

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
    """The contents of a file, checked, as the fields that it may have.

    Raises:
        ValueError: one line with ``place``, the first wrong field, its value, and what is allowed.
    """
    try:
        return fields.model_validate(dict(contents))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = _name(first["loc"], contents)
        if first["type"] == "missing":
            raise ValueError(f"{place}: {name} is missing") from None
        says = "must be an object" if first["type"] == "model_type" else first["msg"]
        allowed = re.sub(r"^(Value error,|(Input|\w+) should) ?", "must ", says)
        raise ValueError(f"{place}: {name} {allowed}, got {shown(first['input'])}") from None


def _name(parts: Sequence[str | int], contents: Any) -> str:
    """The name of a nested field: ``rope_scaling.factor``, ``eos_token_id[1]``, without the types pydantic adds."""
    name = ""
    for part in parts:
        try:
            contents = contents[part]
        except (LookupError, TypeError):
            if isinstance(contents, Mapping) and part == parts[-1]:
                name += f".{plain(part)}"  # the missing field
            continue
        name += f"[{part}]" if isinstance(part, int) else f".{plain(part)}"
    return name.lstrip(".")


def shown(value: Any) -> str:
    """A value for a message: on one line, without terminal control codes, and shortened if it is long.

    >>> shown("a" * 100), shown("a\\x1bb")
    ("'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...", "'a\\\\x1bb'")
    """
    is_long = isinstance(value, int) and abs(value) >= 10**_SHOWN
    return "a number of many digits" if is_long else printable(ascii(value), _SHOWN)


def plain(name: object, most: int = _SHOWN) -> str:
    """The name of a tensor, field or file for a message, or a library's own message: like `shown`, without quotes."""
    return printable(name, most)
