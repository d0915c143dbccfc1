"""The record of a checkpoint: which run it belongs to, where that run was, and checksums of its arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from adalomo_jax.models.fields import Fields, check
from adalomo_jax.training.config import MOST_STEPS

FORMAT = 2
"""The format of a record. It grows when older code cannot read newer checkpoints. Earlier formats are read."""


class Origin(NamedTuple):
    """What a run is made of. A checkpoint continues a run of the same origin."""

    options: Mapping[str, Any]
    """The options that affect the numbers, by name, with the values that they come to."""
    model: Mapping[str, Any]
    """The model's name, and its sizes as the fields of `DecoderConfig`."""
    data: str
    """The `data_fingerprint`."""
    paths: Sequence[str] | None = None
    """The paths of the text, empty for the default. It may be elsewhere now. None in format 1."""


class Record(NamedTuple):
    """What a checkpoint says about itself."""

    step: int
    batches: Mapping[str, Any]
    """The state of the iterator of the training batches."""
    eval_loss: float | None
    """The evaluation loss after this step, if it was evaluated and finite."""
    origin: Origin
    checksums: Mapping[str, Mapping[str, int]]
    """The checksums of the arrays of ``params`` and of ``state``, by name."""


class _Format(Fields):
    format: int = Field(ge=1)


class _BatchesFields(Fields):
    next_index: int = Field(default=0, ge=0, lt=2**48)


class _OriginFields(Fields):
    options: dict[str, Any]
    model: dict[str, Any]
    data: str
    paths: list[str] | None = None


class _RecordFields(Fields):
    step: int = Field(ge=1, le=MOST_STEPS)
    batches: _BatchesFields
    eval_loss: float | None
    origin: _OriginFields
    checksums: dict[str, dict[str, int]]


def sealed(record: Record) -> dict[str, Any]:
    """The record as it is written: with its format, and a digest that shows damage."""
    contents = record._asdict() | {"origin": record.origin._asdict(), "format": FORMAT}
    return {"record": contents, "sha256": _digest(contents)}


def unsealed(found: Any) -> Record:
    """The record that `sealed` has prepared for writing.

    Raises:
        ValueError: it is damaged, of a later format, or has fields of other types or out of their ranges.
    """
    contents = found.get("record") if isinstance(found, dict) else None
    if not isinstance(contents, dict) or found.get("sha256") != _digest(contents):
        raise ValueError("its record is damaged")
    format_of = check(_Format, contents, "its record").format
    if format_of > FORMAT:
        raise ValueError(f"it has the format {format_of}, and this version reads those up to {FORMAT}")
    check(_RecordFields, contents, "its record")
    origin = Origin(*(contents["origin"].get(name) for name in Origin._fields))
    return Record(*(contents[name] for name in Record._fields))._replace(origin=origin)


def _digest(contents: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
