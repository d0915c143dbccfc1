"""A corpus: the documents of files, folders and data sets, and the broken records among them."""

from __future__ import annotations

import codecs
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from adalomo_jax.inputs import InputError
from adalomo_jax.pretrained.hub import Download, is_hub_name
from adalomo_jax.pretrained.tokenizer import Tokenizer
from adalomo_jax.run_files import is_of_run
from adalomo_jax.text.data_sets import (
    AS_NAMED,
    INFO,
    SPLITS,
    STATE,
    Reading,
    Split,
    Splits,
    rows,
    splits_in_folder,
    splits_on_hub,
)
from adalomo_jax.text.documents import (
    Broken,
    Document,
    PassedOver,
    document_of,
    is_blank,
    lines_of,
    parse_record,
)
from adalomo_jax.text.records import renamed

_LINES = (".jsonl", ".ndjson")
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests"}
_COMPRESSED = {
    ".gz": b"\x1f\x8b",
    ".zip": b"PK\x03\x04",
    ".zst": b"\x28\xb5\x2f\xfd",
    ".bz2": b"BZh91AY&SY",
    ".xz": b"\xfd7zXZ\0",
}
"""File endings, and the bytes that such files begin with."""
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_OF_RUN = "the output of a run"
_NO_PART = "a split for neither training nor evaluation"
_DATASET, _DATASETS = (INFO, STATE), (SPLITS,)


class Source(NamedTuple):
    """A source of documents: a file, or a split of a data set."""

    path: Path
    name: str
    """The start of its documents' names."""
    kind: Literal["text", "lines", "dataset", "unread"]
    in_folder: bool = False
    """Found in a folder, not named by the user: if it is no text, it is passed over."""
    evaluation: bool = False
    """Its data set says to evaluate on it."""
    reason: str = ""
    """Why it is not read."""
    split: Split | None = None
    """What is read of a data set."""


class Corpus(NamedTuple):
    """What was read."""

    documents: list[Document]
    evaluation: list[Document]
    """Documents that data sets say to evaluate on. If they say nothing, it is empty: some documents must be kept."""
    broken: list[Broken]
    passed_over: list[PassedOver]


def read_corpus(
    paths: Iterable[Path] | None,
    tokenizer: Tokenizer,
    output: Path | None = None,
    reading: Reading = AS_NAMED,
    before_fetch: Callable[[Download], object] | None = None,
) -> Corpus:
    """All documents of the paths, each file once, in the order given, folders in the order of their names.

    It follows links. It passes over folders that a run has written, and names them: rows and sizes are no text.

    Args:
        paths: text files, files of JSON lines (``.jsonl``, ``.ndjson``, ``.json``, in letters of any case), folders,
            and folders that ``datasets`` has saved. None for the sources of the standard library. In a folder,
            ``.jsonl`` and ``.ndjson`` are lines and all other files are text. Hidden and empty files are passed over.
            Files that are compressed, UTF-16 or have zero bytes are passed over and named.
        tokenizer: its chat template is applied to conversations.
        output: the folder that is being written. It is passed over, whatever it holds.
        reading: which part of a data set is read, and which fields of a record.
        before_fetch: is called before files of a data set are fetched, if any are missing; it may raise.

    Raises:
        InputError: a path is missing, unreadable, empty, compressed or not text in UTF-8.
    """
    if paths is None:
        return Corpus(standard_library(), [], [], [])
    items: dict[tuple[str, str | None], tuple[Source, list[Document | Broken | PassedOver]]] = {}
    for path in paths:
        sources = list_sources(path, output, reading, before_fetch)
        keys = [_key(source) for source in sources]
        for key, source in zip(keys, sources):
            if key not in items:
                items[key] = source, list(_items(source, tokenizer, reading))
        _check_read(path, [item for key in keys for item in items[key][1]])
    found = [(item, source.evaluation) for source, of_source in items.values() for item in of_source]
    return Corpus(
        [item for item, evaluation in found if isinstance(item, Document) and not evaluation],
        [item for item, evaluation in found if isinstance(item, Document) and evaluation],
        [item for item, _ in found if isinstance(item, Broken)],
        [item for item, _ in found if isinstance(item, PassedOver)],
    )


def standard_library() -> list[Document]:
    """The running Python's own ``*.py`` files, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    of_library = lambda path: path.suffix == ".py" and not _NOT_LIBRARY & set(path.relative_to(root).parts)
    paths = [entry.path for entry in _walk(root) if entry.reason is None and of_library(entry.path)]
    items = [item for path in paths for item in _text(Source(path, path.relative_to(root).as_posix(), "text", True))]
    documents = [item for item in items if isinstance(item, Document)]
    if not documents:
        raise InputError(f"this Python has no library sources in {root}; give text with --data")
    return documents


def list_sources(
    path: Path,
    output: Path | None = None,
    reading: Reading = AS_NAMED,
    before_fetch: Callable[[Download], object] | None = None,
) -> list[Source]:
    """The sources that a path of ``--data`` stands for. Reads no documents. Raises InputError if it does not exist."""
    try:
        exists = path.exists()
    except OSError as error:  # a name that is too long, links in a circle
        raise InputError(f"--data {path}: {error.strerror}") from None
    if not exists:
        if is_hub_name(str(path)):
            return _of_splits(splits_on_hub(path, reading, before_fetch))
        raise InputError(f"--data {path}: no such file or folder")
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"--data {path} is a device or a pipe: copy its text into a file")
        return [Source(path, path.name, "lines" if path.suffix.lower() in (*_LINES, ".json") else "text")]
    if is_of_run(path) or (output is not None and os.path.realpath(path) == os.path.realpath(output)):
        return [Source(path, "", "unread", True, reason=_OF_RUN)]
    if _holds(path, _DATASETS):
        return _of_splits(splits_in_folder(path, reading))
    if _holds(path, _DATASET):
        return [Source(path, path.name, "dataset", split=Split(path.name, str(path), None, False))]
    unread = lambda entry: Source(entry.path, "", "unread", True, reason=entry.reason)
    return [unread(entry) if entry.reason else _found(entry.path, path) for entry in _walk(path, output)]


def _key(source: Source) -> tuple[str, str | None]:
    """What a source is, however it is named: the file or folder behind all links, or the split of a name on the hub."""
    on_hub = source.split is not None and source.split.part is not None
    return (str(source.path), source.split.part) if on_hub and source.split else (os.path.realpath(source.path), None)


def _of_splits(splits: Splits) -> list[Source]:
    """The splits to train on and to evaluate on, and the others, for the report of what was not read."""
    return [
        *(Source(Path(one.place), one.name, "dataset", evaluation=one.evaluation, split=one) for one in splits.read),
        *(Source(Path(one.place), one.name, "unread", reason=_NO_PART, split=one) for one in splits.others),
    ]


def _found(file: Path, folder: Path) -> Source:
    """A file of a folder as a source. Files that nobody would expect to be read as text are refused."""
    if file.name in _DATASETS or (file.name in _DATASET and _holds(file.parent, _DATASET)):
        raise InputError(f"--data {folder} holds a folder of datasets: give {file.parent} itself")
    suffixes = [suffix.lower() for suffix in ("", *file.suffixes)]
    if set(_LINES) & set(suffixes[:-1]) and suffixes[-1] in _COMPRESSED:
        raise InputError(f"--data {file} is compressed: unpack it first")
    return Source(file, file.relative_to(folder).as_posix(), "lines" if suffixes[-1] in _LINES else "text", True)


def _check_read(path: Path, items: Sequence[Document | Broken | PassedOver]) -> None:
    """Refuses a path from which nothing was read."""
    passed_over = [item for item in items if isinstance(item, PassedOver)]
    if len(passed_over) < len(items):
        return
    if path.is_dir():
        raise InputError("; ".join([f"--data {path} holds no text files", *lines_of(passed_over)]))
    raise InputError(f"--data {path} is " + (passed_over[0].reason if passed_over else "empty"))


def _items(source: Source, tokenizer: Tokenizer, reading: Reading) -> Iterator[Document | Broken | PassedOver]:
    """The documents of a source, or what is wrong with them."""
    if source.kind == "unread":
        yield PassedOver(str(source.path), source.reason)
        return
    if source.kind == "text":
        yield from _text(source)
        return
    for number, place, read in _lines(source) if source.kind == "lines" else _rows(source, reading):
        try:  # nothing else holds the record: a long conversation is freed once its template has it
            yield document_of(renamed(read(), reading.columns), f"{source.name}:{number}", tokenizer)
        except ValueError as error:
            yield Broken(place, str(error))


def _text(source: Source) -> Iterator[Document | Broken | PassedOver]:
    content = _read(source.path)
    reason = _encoded(content) or ("not text: it has zero bytes" if b"\0" in content else None)
    if reason:
        if not source.in_folder:
            raise InputError(f"--data {source.path} is {reason}")
        yield PassedOver(str(source.path), reason)
        return
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield Broken(f"{source.path}:{line}", "is not UTF-8")
        return
    if not is_blank(text):
        yield Document(source.name, text)


def _lines(source: Source) -> Iterator[tuple[int, str, Callable[[], Mapping[str, Any]]]]:
    """For each line that is not blank: its number, its place, and the function that reads the record."""
    number, is_first = 0, True
    try:
        with source.path.open("rb") as file:
            while line := file.readline():
                number += 1
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                    if reason := _encoded(line):
                        raise InputError(f"--data {source.path} is {reason}")
                if not line or line.isspace():
                    continue
                if is_first and line.lstrip()[:1] == b"[":
                    raise InputError(f"--data {source.path} is one JSON array: write one object a line")
                is_first = False
                read = _once(line, parse_record)
                del line
                yield number, f"{source.path}:{number}", read
    except OSError as error:
        raise InputError(f"cannot read {source.path}: {error.strerror}") from error


def _rows(source: Source, reading: Reading) -> Iterator[tuple[int, str, Callable[[], Mapping[str, Any]]]]:
    """Like `_lines`, for the rows of a data set, counted from 1."""
    assert source.split is not None
    for number, row in rows(source.split, reading):
        read = _once(row, dict)
        del row
        yield number, f"{source.path}: row {number}", read


def _once(x: Any, read: Callable[[Any], Mapping[str, Any]]) -> Callable[[], Mapping[str, Any]]:
    """A function that reads ``x``, once. Its caller alone has the record, and nothing else holds ``x``."""
    held = [x]
    return lambda: read(held.pop())


def _encoded(content: bytes) -> str | None:
    """The encoding, if it is not UTF-8, and the way out."""
    if content.startswith(tuple(_COMPRESSED.values())):
        return "compressed: unpack it first"
    return "UTF-16: save it as UTF-8" if content.startswith(_UTF_16) else None


def _holds(folder: Path, names: Sequence[str]) -> bool:
    return all((folder / name).is_file() for name in names)


class _Entry(NamedTuple):
    """Something below a folder."""

    path: Path
    reason: str | None
    """Why it is not read."""


def _walk(root: Path, output: Path | None = None) -> Iterator[_Entry]:
    """The entries below a folder, without hidden names: files in the order of their names, then those of its folders.

    It follows links, and enters each folder once.
    """
    real, seen = output and os.path.realpath(output), {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, onerror=_raise_unreadable, followlinks=True):
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(folder, name)
            is_broken = path.is_symlink() and not path.exists()
            yield _Entry(path, None if path.is_file() else "a broken link" if is_broken else "no regular file")
        to_read = []
        for name in sorted(name for name in folders if not name.startswith(".")):
            path = Path(folder, name)
            found = os.path.realpath(path)
            if found == real or is_of_run(path):
                yield _Entry(path, _OF_RUN)
            elif found not in seen:
                seen.add(found)
                to_read.append(name)
        folders[:] = to_read


def _read(path: Path) -> bytes:
    """A file's bytes without the byte order mark that some editors put first."""
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _raise_unreadable(error: OSError) -> None:
    raise InputError(f"cannot read {error.filename}: {error.strerror}") from error
