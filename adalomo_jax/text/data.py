"""The data of a run: documents, split into training and evaluation and packed, and what became of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from adalomo_jax.inputs import InputError
from adalomo_jax.pretrained.hub import Download
from adalomo_jax.pretrained.tokenizer import Tokenizer
from adalomo_jax.text.corpus import read_corpus
from adalomo_jax.text.data_sets import AS_NAMED, Reading
from adalomo_jax.text.documents import NO_FORM, Broken, Document, PassedOver, lines_of, listed
from adalomo_jax.text.packing import Packed, pack, tokenize
from adalomo_jax.text.split import split_documents

EVALUATION_SEQUENCES = 64
"""An evaluation reads at least this many sequences, if the text has them."""
EVALUATION_BATCHES = 8
"""It reads at least this many batches, if the text has them."""


class DataReport(NamedTuple):
    """What became of the text. It prints in two lines, and one more for each way in which text was left out."""

    train_documents: int
    evaluation_documents: int
    broken: tuple[Broken, ...]
    """Records that were left out."""
    train_tokens: int
    learned_tokens: int
    """The training tokens that are predicted."""
    evaluation_tokens: int
    evaluation_sequences: int
    train_sequences: int
    padding: float
    """The share of padding in the training sequences."""
    in_both: int
    """Documents to evaluate on whose text is also trained on."""
    short: int
    """Tokens of both parts that were dropped because they were alone."""
    unlearned: int
    """Tokens of both parts that were dropped in pieces with nothing to learn."""
    passed_over: tuple[PassedOver, ...]
    """Files and splits that were not read."""
    unwritten: tuple[tuple[str, int], ...] = ()
    """Fields that the chat template does not write, and how many conversations have each."""

    def __str__(self) -> str:
        lines = [
            f"{self.train_documents:,} documents to train on, {self.evaluation_documents:,} to evaluate on",
            f"{self.train_tokens:,} tokens to train on ({self.learned_tokens:,} of them predicted) in "
            f"{self.train_sequences:,} sequences with {self.padding:.1%} padding, "
            f"{self.evaluation_tokens:,} to evaluate on{self._read_of_them()}",
        ]
        if self.short or self.unlearned:
            lines.append(
                f"dropped: {self.short:,} tokens that stood alone in a sequence, {self.unlearned:,} in pieces of "
                "documents with nothing to predict"
            )
        if self.in_both:
            lines.append(
                f"{self.in_both:,} of the documents to evaluate on have the same text as one to train on: the "
                "evaluation loss will be too low"
            )
        if self.broken:
            lines.append(f"skipped: {_listed(self.broken)}")
        for field, count in self.unwritten:
            lines.append(f"not used, as the chat template does not write it: {field} of {count:,} conversations")
        return "\n".join([*lines, *lines_of(self.passed_over)])

    def _read_of_them(self) -> str:
        """How many sequences `evaluation_batches` takes, unless these are all except for a part of a batch."""
        if self.evaluation_sequences <= EVALUATION_SEQUENCES:
            return ""
        return (
            f"; an evaluation reads about {EVALUATION_SEQUENCES} of their {self.evaluation_sequences:,} sequences, or "
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
    reading: Reading = AS_NAMED,
    before_fetch: Callable[[Download], object] | None = None,
) -> Data:
    """Read, split, tokenize and pack the paths' documents, or the standard library's sources.

    Args:
        paths: as ``read_corpus`` takes them.
        tokenizer: of the model.
        seq_len: tokens of a sequence.
        parts: how many devices a batch is spread over.
        skip_bad: leave out broken records; the report counts them and names the first.
        output: the run's own folder, which is passed over.
        reading: which part of a data set is read, and which fields of a record.
        before_fetch: as ``read_corpus`` takes it.

    Raises:
        InputError: a path cannot be used; there are broken records, listed for all files at once, unless they are
            skipped; or the text is too short for one training sequence, or for one evaluation sequence per part.
        ValueError: the tokenizer has tokens that are not in its vocabulary.
    """
    documents, evaluation, broken, passed_over = read_corpus(paths, tokenizer, output, reading, before_fetch)
    if broken and not skip_bad:
        no_form = any(one.reason.startswith(NO_FORM) for one in broken)
        columns = " name their fields with --columns," if no_form else ""
        raise InputError(f"{_listed(broken)}; mend them,{columns} or leave them out with --skip-bad")
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


def _check_enough(train: Packed, evaluation: Packed, parts: int) -> None:
    for name, packed in {"training": train, "evaluation": evaluation}.items():
        if not packed.sequences:
            raise InputError(
                f"the {name} text is less than one sequence: it has no two tokens of which one can be predicted, "
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


def _listed(broken: Sequence[Broken]) -> str:
    """The first broken records with their reasons, each on one line, and how many more there are."""
    names = [f"{place} {' '.join(reason[:1000].split())}" for place, reason in broken]
    return f"{len(broken):,} broken record{'s' * (len(broken) > 1)}: {listed(names)}"
