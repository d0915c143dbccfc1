"""Text: the split, the batches, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from adalomo_jax.finetune.config import InputError
from adalomo_jax.finetune.data import (
    EVALUATION_SHARE,
    Document,
    Text,
    evaluation_batches,
    load_text,
    read_documents,
    split_documents,
    standard_library,
    training_batch,
)

DOCUMENTS = [Document(f"{i}.txt", f"document {i}\n".encode() * (10 + i)) for i in range(40)]
TEXT = Text(np.arange(100, dtype=np.uint8), np.arange(100, 200, dtype=np.uint8))


def test_split_by_file_is_disjoint_and_complete():
    train, evaluation = split_documents(DOCUMENTS)
    assert sorted(train + evaluation) == sorted(DOCUMENTS)
    share = sum(len(d.content) for d in evaluation) / sum(len(d.content) for d in DOCUMENTS)
    assert EVALUATION_SHARE <= share < EVALUATION_SHARE + 0.06


def test_split_does_not_depend_on_the_order():
    chosen = {document.name for document in split_documents(DOCUMENTS)[1]}
    assert chosen == {document.name for document in split_documents(DOCUMENTS[::-1])[1]}
    assert chosen != {document.name for document in DOCUMENTS[: len(chosen)]}


def test_two_files_are_one_for_each():
    train, evaluation = split_documents([Document("a", b"a" * 10), Document("b", b"b" * 1000)])
    assert len(train) == len(evaluation) == 1


def test_one_file_is_split_by_its_tail():
    train, evaluation = split_documents([Document("a", bytes(range(100)))])
    assert train[0].content == bytes(range(90))
    assert evaluation[0].content == bytes(range(90, 100))


def test_standard_library_is_real_code_without_tests():
    names = [document.name for document in standard_library()]
    assert "argparse.py" in names
    assert not [name for name in names if {"site-packages", "test", "tests"} & set(name.split("/"))]
    assert all(name.endswith(".py") for name in names)


def test_folders_are_read_recursively_and_files_once(tmp_path):
    (tmp_path / "inner" / ".git").mkdir(parents=True)
    for name in ("b.txt", "inner/a.txt", ".hidden", "inner/.git/config"):
        (tmp_path / name).write_text(name)
    (tmp_path / "image").write_bytes(b"\x89PNG\0")
    (tmp_path / "none").touch()
    documents = read_documents([tmp_path, tmp_path / "b.txt", tmp_path / "inner" / ".." / "b.txt"])
    assert [document.name for document in documents] == ["b.txt", "inner/a.txt"]


def test_training_batches_are_a_function_of_seed_and_step():
    def batch(seed, step):
        return training_batch(TEXT, seed=seed, step=step, batch_size=4, seq_len=8)

    assert batch(0, 1).shape == (4, 8)
    assert batch(0, 1).dtype == np.int32
    assert np.all(np.diff(batch(0, 1)) == 1)
    assert np.array_equal(batch(0, 1), batch(0, 1))
    assert not np.array_equal(batch(0, 1), batch(0, 2))
    assert not np.array_equal(batch(0, 1), batch(1, 1))


def test_training_reaches_the_first_and_last_byte_and_no_other_text():
    batches = [training_batch(TEXT, seed=0, step=step, batch_size=64, seq_len=8) for step in range(20)]
    assert np.min(batches) == 0
    assert np.max(batches) == 99


@pytest.mark.parametrize(("batch_size", "shape"), [(2, (6, 2, 8)), (1, (8, 1, 8)), (64, (1, 12, 8))])
def test_evaluation_sequences_are_disjoint(batch_size, shape):
    batches = evaluation_batches(TEXT, batch_size=batch_size, seq_len=8)
    assert batches.shape == shape
    assert len(np.unique(batches)) == batches.size
    assert batches.min() == 100 and batches.max() == 199


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match="cannot read .*a.txt: Permission denied"):
        load_text([tmp_path / "a.txt"], 2)
