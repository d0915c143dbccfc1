"""Text from files, as bytes: its split into training and evaluation, and its batches."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adalomo_jax.finetune.config import InputError

EVALUATION_SHARE = 0.1
"""Share of the bytes that is kept for evaluation."""
EVALUATION_BATCHES = 8
"""Most batches that an evaluation reads."""

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests"}


class Document(NamedTuple):
    """One file."""

    name: str
    content: bytes


class Text(NamedTuple):
    """Tokens (bytes) of the two parts, ``uint8``."""

    train: np.ndarray
    evaluation: np.ndarray


def load_text(paths: Sequence[Path] | None, seq_len: int, parts: int = 1) -> Text:
    """Read and split the files, or the standard library's sources where ``paths`` is None.

    Raises:
        InputError: a path that is missing, unreadable, empty or not text; a text shorter than one sequence; one to
            evaluate on with fewer sequences than the ``parts`` that a batch is spread over.
    """
    documents = standard_library() if paths is None else read_documents(paths)
    train, evaluation = split_documents(documents)
    text = Text(_concatenate(train), _concatenate(evaluation))
    for part, tokens in text._asdict().items():
        if len(tokens) < seq_len:
            raise InputError(
                f"the {part} text has {len(tokens)} bytes, fewer than one sequence of --seq-len {seq_len}; "
                "give more text or a shorter sequence"
            )
    if len(text.evaluation) < parts * seq_len:
        raise InputError(
            f"the evaluation text has {len(text.evaluation)} bytes, fewer than a sequence of --seq-len {seq_len} for "
            f"each of the {parts} devices that --mesh spreads a batch over; give more text or a shorter sequence"
        )
    return text


def standard_library() -> list[Document]:
    """The running Python's own ``*.py`` files, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = [
        Document(path.relative_to(root).as_posix(), _read(path))
        for path in _walk(root)
        if path.suffix == ".py" and not _NOT_LIBRARY & set(path.relative_to(root).parts)
    ]
    documents = [document for document in documents if document.content]
    if not documents:
        raise InputError(f"this Python has no library sources in {root}; give text with --data")
    return documents


def read_documents(paths: Iterable[Path]) -> list[Document]:
    """Each file once, in the order given, folders in the order of their names."""
    documents: dict[Path, Document] = {}
    for path in paths:
        for document_path, document in _documents_of(path):
            documents.setdefault(document_path.resolve(), document)
    return list(documents.values())


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Training and evaluation documents: whole ones, chosen by a hash of their names until they hold the share.

    The choice depends on names and sizes only: not on the seed, nor on where the folder lies. A single document is cut.
    """
    if len(documents) == 1:
        name, content = documents[0]
        cut = len(content) - round(len(content) * EVALUATION_SHARE)
        return [Document(name, content[:cut])], [Document(name, content[cut:])]
    wanted = EVALUATION_SHARE * sum(len(document.content) for document in documents)
    chosen, size = set(), 0
    for i in sorted(range(len(documents)), key=lambda i: (_hash(documents[i]), i))[:-1]:
        if size >= wanted:
            break
        chosen.add(i)
        size += len(documents[i].content)
    train = [document for i, document in enumerate(documents) if i not in chosen]
    return train, [documents[i] for i in sorted(chosen)]


def training_batch(text: Text, *, seed: int, step: int, batch_size: int, seq_len: int) -> np.ndarray:
    """``[batch_size, seq_len]`` int32: sequences from anywhere in the training text. A function of seed and step."""
    generator = np.random.default_rng((seed, step))
    starts = generator.integers(0, len(text.train) - seq_len + 1, batch_size)
    return _sequences(text.train, starts, seq_len)


def evaluation_batches(text: Text, *, batch_size: int, seq_len: int, parts: int = 1) -> np.ndarray:
    """``[batches, batch_size, seq_len]`` int32: fixed sequences, evenly spaced and disjoint. Small texts: fewer.

    The batch size is a multiple of ``parts``.
    """
    available = len(text.evaluation) // seq_len
    batch_size = min(batch_size, available) // parts * parts
    batches = min(EVALUATION_BATCHES, available // batch_size)
    starts = np.linspace(0, len(text.evaluation) - seq_len, batches * batch_size).astype(np.int64)
    return _sequences(text.evaluation, starts, seq_len).reshape(batches, batch_size, seq_len)


def _sequences(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
    return tokens[starts[:, None] + np.arange(seq_len)].astype(np.int32)


def _concatenate(documents: Sequence[Document]) -> np.ndarray:
    return np.frombuffer(b"".join(document.content for document in documents), np.uint8)


def _hash(document: Document) -> bytes:
    return hashlib.sha256(document.name.encode()).digest()


def _documents_of(path: Path) -> list[tuple[Path, Document]]:
    if path.is_dir():
        found = [(p, Document(p.relative_to(path).as_posix(), _read(p))) for p in _walk(path)]
        found = [(p, document) for p, document in found if document.content and _is_text(document.content)]
        if not found:
            raise InputError(f"--data {path} holds no text files")
        return found
    if not path.exists():
        raise InputError(f"--data {path}: no such file or folder")
    content = _read(path)
    if not content.strip():
        raise InputError(f"--data {path} is empty")
    if not _is_text(content):
        raise InputError(f"--data {path} is not text: it has zero bytes")
    return [(path, Document(path.name, content))]


def _is_text(content: bytes) -> bool:
    return b"\0" not in content


def _walk(root: Path) -> Iterator[Path]:
    """Regular files below a folder in the order of their names, without hidden ones."""
    for folder, folders, names in os.walk(root, onerror=_raise_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        yield from (path for path in files if path.is_file())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _raise_unreadable(error: OSError) -> None:
    raise InputError(f"cannot read {error.filename}: {error.strerror}") from error
