"""Splits documents into those to train on and those kept for evaluation."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from adalomo_jax.inputs import InputError
from adalomo_jax.text.documents import Document

EVALUATION_SHARE = 0.1
"""Share of the characters that is kept for evaluation."""
SHARE_FACTOR = 2
"""Whole documents may hold up to this many times the share, or down to this part of it. Otherwise the tail of one is
cut off. So training loses at most a fifth of the text, and the evaluation has at least a twentieth."""


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Training and evaluation documents: whole ones, chosen by a hash of their names until they hold the share.

    A document that would bring them above twice the share is passed over. If the chosen ones hold less than half of the
    share, as with a few large documents, the tail of the largest is kept instead, as long as the share. The choice
    depends only on names and sizes, not on the order, the seed or the folder's place. Documents that are learned only
    in part are not cut: if there are no others, the smallest is kept.

    Raises:
        InputError: the only document is learned only in part.

    >>> split_documents([Document("book.txt", "To be, or not to be."), Document("notes.txt", "?")])[1]
    [Document(name='book.txt', text='e.', learned=None, formatted=False, unwritten=())]
    """
    wanted = EVALUATION_SHARE * sum(len(document.text) for document in documents)
    chosen = _fitting(documents, wanted)
    if sum(len(documents[i].text) for i in chosen) >= wanted / SHARE_FACTOR:
        return _parted(documents, chosen)
    by_size = sorted(range(len(documents)), key=lambda i: (len(documents[i].text), _hash(documents[i])))
    for i in reversed(by_size):
        if documents[i].learned is None and len(documents[i].text) > wanted:
            return _cut(documents, i, round(wanted))
    if len(documents) == 1:
        raise InputError(f"--data must have two documents at least, one to evaluate on, got only {documents[0].name}")
    return _parted(documents, chosen or {by_size[0]})


def _fitting(documents: Sequence[Document], wanted: float) -> set[int]:
    """The first documents, by their hashes, that hold the wanted size, without those that hold far too much."""
    chosen, size = set(), 0
    for i in sorted(range(len(documents)), key=lambda i: (_hash(documents[i]), i)):
        if size >= wanted:
            break
        if size + len(documents[i].text) <= SHARE_FACTOR * wanted:
            chosen.add(i)
            size += len(documents[i].text)
    return chosen


def _parted(documents: Sequence[Document], chosen: set[int]) -> tuple[list[Document], list[Document]]:
    """The documents that are not chosen, and those that are."""
    train = [document for i, document in enumerate(documents) if i not in chosen]
    return train, [documents[i] for i in sorted(chosen)]


def _cut(documents: Sequence[Document], i: int, length: int) -> tuple[list[Document], list[Document]]:
    """All documents without the tail of one, and that tail."""
    at = len(documents[i].text) - length
    train = [*documents]
    train[i] = documents[i]._replace(text=documents[i].text[:at])
    return train, [documents[i]._replace(text=documents[i].text[at:])]


def _hash(document: Document) -> bytes:
    return hashlib.sha256(os.fsencode(document.name)).digest()
