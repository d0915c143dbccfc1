"""Data sets of Hugging Face's ``datasets``: folders that it has saved, and names on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adalomo_jax.inputs import InputError
from adalomo_jax.pretrained.hub import Download, check_data_set, repository_and_revision
from adalomo_jax.text.records import FIELDS, columns_of

EVALUATION_SPLITS = ("validation", "test")
"""The splits of a data set that may be evaluated on. The first that exists is used."""
TRAIN = "train"
INFO, STATE, SPLITS = "dataset_info.json", "state.json", "dataset_dict.json"
"""The files that ``datasets`` writes: the first two for a split, the last for several."""
_BUILDERS = ("parquet", "json", "csv", "text", "arrow")
"""What ``datasets`` may read from the hub. Some of its other readers unpickle."""
_MODULES = "datasets.packaged_modules."


class Reading(NamedTuple):
    """Which part of a data set is read, and how its columns are named."""

    split: str | None = None
    """The split to train on; None is ``train``."""
    subset: str | None = None
    """The subset of a data set on the hub that has several."""
    columns: Mapping[str, str] = {}
    """The columns that are read as ``text``, ``prompt``, ``completion`` or ``messages``; empty if they have these
    names."""


AS_NAMED = Reading()


class Split(NamedTuple):
    """A split of a data set: a folder, or a part of a data set on the hub."""

    name: str
    """The start of its documents' names."""
    place: str
    """Its folder, or its name on the hub."""
    part: str | None
    """The split, for a data set on the hub."""
    evaluation: bool
    """It is evaluated on."""


class Splits(NamedTuple):
    """The splits that are read, and those that are not."""

    read: list[Split]
    others: list[Split]


def splits_in_folder(path: Path, reading: Reading) -> Splits:
    """The splits that ``datasets`` has saved in a folder. Raises InputError if there is none to train on."""
    try:
        splits = json.loads((path / SPLITS).read_bytes())["splits"]
        if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
            raise TypeError
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"--data {path}: {SPLITS} names no splits") from error
    of = lambda split: Split(f"{path.name}/{split}", str(path / split), None, split != _to_train(reading))
    return _chosen(splits, of, str(path), reading, "give one of its folders, or --split")


def splits_on_hub(path: Path, reading: Reading, before: Callable[[Download], object] | None = None) -> Splits:
    """The splits of a data set on the hub; ``before`` is called if its files have to be fetched.

    Raises:
        InputError: there is no such data set, or none to train on, or the disk has no room for it.
    """
    name = str(path)
    builder = _builder(name, reading)
    _read(name, lambda: check_data_set(name, _files(name, builder), builder.info.dataset_size, before))
    splits = [str(split) for split in builder.info.splits or builder.config.data_files or [_to_train(reading)]]
    of = lambda split: Split(f"{name}/{split}", name, split, split != _to_train(reading))
    return _chosen(splits, of, name, reading, "name one with --split")


def _to_train(reading: Reading) -> str:
    return TRAIN if reading.split is None else reading.split


def _chosen(splits: Sequence[str], of: Any, place: str, reading: Reading, way_out: str) -> Splits:
    train = _to_train(reading)
    if train not in splits:
        raise InputError(f"--data {place} must have the split {train}, got {', '.join(splits)}; {way_out}")
    evaluation = [split for split in EVALUATION_SPLITS if split in splits and split != train][:1]
    read = [train, *evaluation]
    return Splits([of(split) for split in read], [of(split) for split in splits if split not in read])


def rows(split: Split, reading: Reading) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a split with the columns that may be read, and their numbers from 1.

    Raises:
        InputError: it cannot be read, or has none of these columns.
    """
    on_hub = split.part is not None
    dataset = _read(split.place, lambda: _on_hub(split, reading) if on_hub else _saved(split)).with_format(None)
    columns = columns_of(dataset.column_names, reading.columns)
    if not columns:
        raise InputError(
            f"--data {split.place} must have the columns {FIELDS}, got {', '.join(dataset.column_names)}; say which "
            "is which with --columns, such as --columns prompt=question completion=answer"
        )
    try:
        yield from enumerate(dataset.select_columns(columns), 1)
    except (OSError, ValueError, LookupError, TypeError) as error:  # a file that is damaged further on
        raise InputError(f"--data {split.place} cannot be read by datasets: {_reason(split.place, error)}") from error


def _saved(split: Split) -> Any:
    from datasets import load_from_disk

    return load_from_disk(split.place)


def _on_hub(split: Split, reading: Reading) -> Any:
    from datasets import load_dataset

    repository, revision = repository_and_revision(split.place)
    return load_dataset(repository, reading.subset, split=split.part, revision=revision)


def _builder(name: str, reading: Reading) -> Any:
    def build() -> Any:
        from datasets import load_dataset_builder

        repository, revision = repository_and_revision(name)
        return load_dataset_builder(repository, reading.subset, revision=revision)

    builder = _read(name, build)
    modules = [base.__module__.removeprefix(_MODULES) for base in type(builder).__mro__]
    kind = next((name.split(".")[0] for name in modules if not name.startswith("datasets")), "other")
    if kind not in (*_BUILDERS, "cache"):  # its own cache has what was read before
        raise InputError(f"--data {name} is made of {kind} files; {', '.join(_BUILDERS)} are read")
    return builder


def _files(name: str, builder: Any) -> list[str]:
    """The paths of the files of a data set, within it."""
    urls = [str(url) for of_split in (builder.config.data_files or {}).values() for url in of_split]
    start = f"hf://datasets/{repository_and_revision(name)[0]}@"
    return [url.removeprefix(start).partition("/")[2] for url in urls if url.startswith(start)]


def _read(place: str, read: Any) -> Any:
    """What ``datasets`` returns. Its errors become one line."""
    try:
        return read()
    except ImportError as error:
        message = f"--data {place} needs the package datasets: pip install 'adalomo-jax[datasets]'"
        raise InputError(message) from error
    except Exception as error:
        raise InputError(f"--data {place} cannot be read by datasets: {_reason(place, error)}") from error


def _reason(place: str, error: Exception) -> str:
    said = " ".join(str(error).split())
    kind = type(error).__name__
    if "Config name is missing" in said or "BuilderConfig" in said:
        return f"{said}; name one with --subset"
    if kind == "DatasetNotFoundError" and "gated" in said:
        return f"it is gated: accept its terms, then give your token by `hf auth login` or HF_TOKEN ({said})"
    if kind == "DatasetNotFoundError":
        return f"there is no file or folder {place}, and no data set of that name on the hub ({said})"
    if isinstance(error, ConnectionError):
        return f"there is no file or folder {place}, and if it is a data set on the hub: {said}"
    return said
