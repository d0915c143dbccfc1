"""The data of a run: documents split into training and evaluation, packed, and their batches."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from adalomo_jax.finetune.config import InputError
from adalomo_jax.finetune.corpus import read_corpus
from adalomo_jax.finetune.documents import Broken, Document, PassedOver, lines_of, listed
from adalomo_jax.finetune.packing import Batch, Packed, pack, tokenize
from adalomo_jax.pretrained.tokenizer import Tokenizer

EVALUATION_SHARE = 0.1
"""Share of the characters that is kept for evaluation."""
SHARE_FACTOR = 2
"""Whole documents may come to this many times the share or to this part of it; else the tail of one is cut off. So
training loses a fifth of the text at most, and a twentieth at least is there to evaluate on."""
EVALUATION_SEQUENCES = 64
"""Sequences that an evaluation reads at least, where the text has them."""
EVALUATION_BATCHES = 8
"""Batches that it reads at least, where the text has them."""
ENDLESS = 2**48
"""More sequences than any run reads."""


class DataReport(NamedTuple):
    """What became of the text. It prints in two lines, and one more for each way in which text was left out."""

    train_documents: int
    evaluation_documents: int
    broken: tuple[Broken, ...]
    """Records that were left out."""
    train_tokens: int
    learned_tokens: int
    """Those of the training tokens that are predicted."""
    evaluation_tokens: int
    evaluation_sequences: int
    train_sequences: int
    padding: float
    """Its share of the training sequences."""
    in_both: int
    """Documents to evaluate on whose text is to be trained on, too."""
    short: int
    """Tokens that were dropped because they were alone, of both parts."""
    unlearned: int
    """Tokens that were dropped in pieces where nothing is to be learned, of both parts."""
    passed_over: tuple[PassedOver, ...]
    """Files and splits that were not read."""
    unwritten: tuple[tuple[str, int], ...] = ()
    """What conversations have and the chat template does not write, and how many conversations."""

    def __str__(self) -> str:
        lines = [
            f"{self.train_documents:,} documents to train on, {self.evaluation_documents:,} to evaluate on",
            f"{self.train_tokens:,} tokens to train on ({self.learned_tokens:,} of them predicted) in "
            f"{self.train_sequences:,} sequences with {self.padding:.1%} of padding, "
            f"{self.evaluation_tokens:,} to evaluate on{self._read_of_them()}",
        ]
        if self.short or self.unlearned:
            lines.append(
                f"dropped: {self.short:,} tokens that a cut left alone, {self.unlearned:,} in pieces of documents "
                "where nothing is to be predicted"
            )
        if self.in_both:
            lines.append(
                f"{self.in_both:,} of the documents to evaluate on are to be trained on, too, with the same text: "
                "the evaluation loss will be too low"
            )
        if self.broken:
            lines.append(f"left out: {_listed(self.broken)}")
        for field, count in self.unwritten:
            lines.append(f"not used: {field} of {count:,} conversations, which the chat template does not write")
        return "\n".join([*lines, *lines_of(self.passed_over)])

    def _read_of_them(self) -> str:
        """How many sequences `evaluation_batches` takes, where those are not all but for a part of a batch."""
        if self.evaluation_sequences <= EVALUATION_SEQUENCES:
            return ""
        return (
            f", of whose {self.evaluation_sequences:,} sequences an evaluation reads about {EVALUATION_SEQUENCES}, or "
            f"{EVALUATION_BATCHES} batches if that is more"
        )


class Data(NamedTuple):
    """Packed sequences of both parts."""

    train: Packed
    evaluation: Packed
    report: DataReport


def load_data(
    paths: Sequence[Path] | None,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    parts: int = 1,
    skip_bad: bool = False,
    output: Path | None = None,
) -> Data:
    """Read, split, tokenize and pack the paths' documents, or the standard library's sources.

    Args:
        paths: as ``read_corpus`` takes them.
        tokenizer: of the model.
        seq_len: tokens of a sequence.
        parts: over how many devices a batch is spread.
        skip_bad: leave out broken records; the report counts them and names the first.
        output: the run's own folder, which is passed over.

    Raises:
        InputError: a path that cannot be used; broken records, of all files at once, unless they are skipped; too
            little text for one sequence to train on, or for a sequence to evaluate on for each of the parts.
        ValueError: a tokenizer with tokens that are not in its vocabulary.
    """
    documents, evaluation, broken, passed_over = read_corpus(paths, tokenizer, output)
    if broken and not skip_bad:
        raise InputError(f"{_listed(broken)}; mend them, or leave them out with --skip-bad")
    if not documents:
        raise InputError(f"--data has no document to train on: {_listed(broken)}" if broken else "--data has no text")
    if not evaluation:
        documents, evaluation = split_documents(documents)
    train_packed, evaluation_packed = (pack(tokenize(part, tokenizer), seq_len) for part in (documents, evaluation))
    _check_enough(train_packed, evaluation_packed, parts)
    report = DataReport(
        train_documents=len(documents),
        evaluation_documents=len(evaluation),
        broken=tuple(broken),
        train_tokens=train_packed.tokens,
        learned_tokens=train_packed.learned,
        evaluation_tokens=evaluation_packed.tokens,
        evaluation_sequences=evaluation_packed.sequences,
        train_sequences=train_packed.sequences,
        padding=train_packed.padding,
        in_both=_in_both(documents, evaluation),
        short=train_packed.short + evaluation_packed.short,
        unlearned=train_packed.unlearned + evaluation_packed.unlearned,
        passed_over=tuple(passed_over),
        unwritten=tuple(Counter(field for one in (*documents, *evaluation) for field in one.unwritten).items()),
    )
    return Data(train_packed, evaluation_packed, report)


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Training and evaluation documents: whole ones, chosen by a hash of their names until they hold the share.

    A document with which they would hold more than twice the share is passed over. Where those that are left hold less
    than half of it, as of a few large documents, the tail of the largest is kept instead, as long as the share. The
    choice depends on names and sizes only: not on the order, the seed, nor on where the folder lies. Documents of which
    only parts are learned are not cut: where there are no others, the smallest is kept.

    Raises:
        InputError: a single document of which only parts are learned.

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


def training_batches(
    data: Data, *, batch_size: int, seed: int, process: int = 0, processes: int = 1
) -> grain.IterDataset[Batch]:
    """Batches without end: all sequences once in an order drawn from the seed, then again in another order.

    Its iterators yield this process's rows of the batches, ``[batch_size // processes, seq_len]``. Batch k of all
    processes together has the same sequences however many there are. ``get_state`` and ``set_state`` of an iterator
    continue it with the very next batch.

    Args:
        data: all of it, the same in each process.
        batch_size: sequences of all processes together; a multiple of ``processes``.
        seed: from 0 to 2**32 - 1.
        process: which process this is, from 0.
        processes: how many there are.

    Raises:
        ValueError: a batch that cannot be divided, or a process that there is not.
    """
    if batch_size < 1 or batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of the {processes} processes, got {batch_size}")
    if not 0 <= process < processes:
        raise ValueError(f"process must be from 0 to one less than the {processes} processes, got {process}")
    # Numbers of sequences pass through grain, and one operation takes a whole batch of them.
    # Not repeat(): its length is more than len() can say where batches are of one sequence (grain 0.2.18).
    epochs = ENDLESS // data.train.sequences + 1
    numbers = grain.MapDataset.range(data.train.sequences).seed(seed).shuffle().repeat(epochs)
    rows = numbers[process::processes].batch(batch_size // processes).map(data.train.take)
    # No threads read ahead: the sequences are in memory, and a batch of them is there in well under a millisecond.
    return rows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def evaluation_batches(data: Data, *, batch_size: int, parts: int = 1) -> Batch:
    """``[batches, batch_size, seq_len]``: fixed sequences, evenly spaced, each once.

    The batch size is a multiple of ``parts``. Of small texts the batches are fewer, or smaller.
    """
    available = data.evaluation.sequences
    batch_size = min(batch_size, available) // parts * parts
    wanted = max(EVALUATION_BATCHES, -(-EVALUATION_SEQUENCES // batch_size))
    batches = min(wanted, available // batch_size)
    chosen = np.linspace(0, available - 1, batches * batch_size).astype(np.int64)
    return data.evaluation.take(chosen.reshape(batches, batch_size))


def _check_enough(train: Packed, evaluation: Packed, parts: int) -> None:
    for name, packed in {"training": train, "evaluation": evaluation}.items():
        if not packed.sequences:
            raise InputError(
                f"the {name} text is fewer than one sequence: it has no two tokens of which one is to be predicted, "
                f"and {packed.short + packed.unlearned:,} tokens were dropped; give more text"
                + (" or a longer --seq-len" if packed.unlearned else "")
            )
    if evaluation.sequences < parts:
        raise InputError(
            f"the evaluation text makes {evaluation.sequences} sequences, fewer than one for each of the {parts} "
            "devices that --mesh spreads a batch over; give more text or a shorter --seq-len"
        )


def _in_both(train: Sequence[Document], evaluation: Sequence[Document]) -> int:
    digest = lambda document: hashlib.sha256(document.text.encode()).digest()
    of_train = set(map(digest, train))
    return sum(digest(document) in of_train for document in evaluation)


def _fitting(documents: Sequence[Document], wanted: float) -> set[int]:
    """The first documents, by their hashes, that hold what is wanted, without those that hold far too much."""
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
    """All documents but the tail of one, and that tail."""
    at = len(documents[i].text) - length
    train = [*documents]
    train[i] = documents[i]._replace(text=documents[i].text[:at])
    return train, [documents[i]._replace(text=documents[i].text[at:])]


def _listed(broken: Sequence[Broken]) -> str:
    """The first broken records with their reasons, each on one line, and how many more there are."""
    names = [f"{place} {' '.join(reason[:1000].split())}" for place, reason in broken]
    return f"{len(broken):,} broken record{'s' * (len(broken) > 1)}: {listed(names)}"


def _hash(document: Document) -> bytes:
    return hashlib.sha256(os.fsencode(document.name)).digest()
