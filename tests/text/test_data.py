"""Data is split, reported, and batched for one process or several; unusable data is refused."""

import itertools
import json

import numpy as np
import pytest
from tiers import slow
from toy_tokenizer import EOS, ToyTokenizer

from adalomo_jax.inputs import InputError
from adalomo_jax.text.batches import evaluation_batches, training_batches
from adalomo_jax.text.corpus import standard_library
from adalomo_jax.text.data import Data, load_data
from adalomo_jax.text.documents import Document
from adalomo_jax.text.packing import Tokenized, pack
from adalomo_jax.text.split import EVALUATION_SHARE, SHARE_FACTOR, split_documents

DOCUMENTS = [Document(f"{i}.txt", f"document {i}\n" * (10 + i)) for i in range(40)]
BYTES = ToyTokenizer(special=False)


def numbered(sequences):
    """Packed sequences of 4 tokens; sequence i starts with token 4 i."""
    count = 4 * sequences
    return pack(Tokenized(np.arange(count, dtype=np.uint16), np.ones(count, bool), np.array([count])), 4)


DATA = Data(numbered(10), numbered(13), None)  # pyright: ignore[reportArgumentType]


def numbers(batch):
    return (batch.tokens_BT[..., 0] // 4).tolist()


def take(iterator, count):
    return [numbers(batch) for batch in itertools.islice(iterator, count)]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" if isinstance(record, dict) else record for record in records))
    return path


def test_split_by_document_is_disjoint_and_complete():
    train, evaluation = split_documents(DOCUMENTS)
    assert sorted(train + evaluation) == sorted(DOCUMENTS)
    share = sum(len(d.text) for d in evaluation) / sum(len(d.text) for d in DOCUMENTS)
    assert EVALUATION_SHARE <= share < EVALUATION_SHARE + 0.06


def test_split_does_not_depend_on_the_order():
    chosen = {document.name for document in split_documents(DOCUMENTS)[1]}
    assert chosen == {document.name for document in split_documents(DOCUMENTS[::-1])[1]}
    assert chosen != {document.name for document in DOCUMENTS[: len(chosen)]}


@pytest.mark.parametrize("notes", ["notes.txt", "a", "b", "c"])
def test_a_large_document_is_not_held_out_whole_whatever_its_name(notes):
    small, book = Document(notes, "n" * 10), Document("book.txt", "b" * 980 + "e" * 10)
    for documents in ([small, book], [book, small]):
        train, evaluation = split_documents(documents)
        assert evaluation == [Document("book.txt", "b" * 90 + "e" * 10)]
        assert sorted(train) == sorted([small, Document("book.txt", "b" * 890)])


def test_a_document_too_large_to_hold_out_is_passed_over_for_the_next():
    documents = [Document(f"{i}", "t" * 20) for i in range(30)]
    first, *rest = split_documents(documents)[1]
    larger = [document._replace(text="t" * 500) if document == first else document for document in documents]
    held = split_documents(larger)[1]
    assert first.name not in [document.name for document in held]
    assert set(rest) < set(held) and len(held) == 6  # 120 of 1080: the fewest documents that hold the share


@pytest.mark.parametrize(
    "sizes", [[100] * 2, [100] * 4, [100] * 5, [100] * 9, [1, 999], [30, 30, *[188] * 5], [1] * 40]
)
def test_what_is_held_out_is_within_a_factor_of_two_of_the_share(sizes):
    train, evaluation = split_documents([Document(f"{i}.txt", "t" * size) for i, size in enumerate(sizes)])
    held, total = (sum(len(document.text) for document in part) for part in (evaluation, [*train, *evaluation]))
    assert total == sum(sizes)
    assert EVALUATION_SHARE / SHARE_FACTOR <= held / total <= EVALUATION_SHARE * SHARE_FACTOR


def test_a_document_that_is_learned_in_parts_is_not_cut():
    parts = [Document(name, "p" * size, ((0, 1),)) for name, size in (("a", 500), ("b", 350), ("c", 400))]
    assert split_documents(parts) == ([parts[0], parts[2]], [parts[1]])
    train, evaluation = split_documents([*parts, Document("d", "t" * 380)])
    assert evaluation == [Document("d", "t" * 163)] and train[:3] == parts


def test_one_document_is_split_by_its_tail_between_characters():
    train, evaluation = split_documents([Document("a", "ä" * 90 + "ö" * 10)])
    assert train == [Document("a", "ä" * 90)]
    assert evaluation == [Document("a", "ö" * 10)]
    with pytest.raises(InputError, match="two documents at least"):
        split_documents([Document("a", "question answer", ((9, 15),))])


@pytest.mark.slow
def test_the_default_is_the_standard_library():
    data = load_data(None, BYTES, seq_len=2048)
    report, documents = data.report, standard_library()
    assert report.train_documents + report.evaluation_documents == len(documents)
    total = sum(len(document.text.encode()) for document in documents)
    assert report.train_tokens + report.evaluation_tokens + report.short + report.unlearned == total
    assert report.padding < 0.01
    assert str(report).count("\n") in (1, 2)


def test_the_report_counts_what_became_of_the_text(tmp_path):
    write(tmp_path / "train.jsonl", *[{"prompt": "p" * 5, "completion": "c" * 4}] * 9, "broken\n", {"text": ""})
    data = load_data([tmp_path / "train.jsonl"], ToyTokenizer(), seq_len=6, skip_bad=True)
    report = data.report  # a document is <s>ppppp|cccc</s>: its first piece is dropped
    assert (report.train_documents, report.evaluation_documents, len(report.broken)) == (8, 1, 2)
    assert (report.train_tokens, report.learned_tokens, report.evaluation_tokens) == (8 * 5, 8 * 4, 5)
    assert (report.short, report.unlearned) == (0, 9 * 6)
    assert (report.train_sequences, report.padding) == (8, pytest.approx(1 / 6))
    assert str(report).splitlines() == [
        "8 documents to train on, 1 to evaluate on",
        "40 tokens to train on (32 of them predicted) in 8 sequences with 16.7% padding, 5 to evaluate on",
        "dropped: 0 tokens that stood alone in a sequence, 54 in pieces of documents with nothing to predict",
        "1 of the documents to evaluate on have the same text as one to train on: the evaluation loss will be too low",
        f"skipped: 2 broken records: {tmp_path}/train.jsonl:10 is not JSON: Expecting value at character 1 of the "
        f"line; {tmp_path}/train.jsonl:11 text is empty",
    ]


@pytest.mark.parametrize(
    ("sequences", "said"), [(64, ""), (65, "an evaluation reads about 64 of their 65 sequences, or 8 batches")]
)
def test_the_report_says_how_much_of_the_text_an_evaluation_reads(tmp_path, sequences, said):
    (tmp_path / "a.txt").write_text("a" * 80 * sequences)
    data = load_data([tmp_path], BYTES, seq_len=8)
    assert data.report.evaluation_sequences == data.evaluation.sequences == sequences
    assert evaluation_batches(data, batch_size=4).tokens_BT.shape[:2] == (16, 4)
    assert said in str(data.report) and ("an evaluation reads" in str(data.report)) == bool(said)


def test_the_report_names_what_was_not_read(tmp_path):
    for i in range(1005):
        (tmp_path / f"{i:04}.png").write_bytes(b"\0")
    (tmp_path / "wide.txt").write_bytes("\ufeffwide".encode("utf-16-le"))
    (tmp_path / "a.txt").write_text("a" * 300)
    assert str(load_data([tmp_path], BYTES, seq_len=8).report).splitlines()[-2:] == [
        f"1,005 passed over (not text: it has zero bytes): {tmp_path}/0000.png; {tmp_path}/0001.png; "
        f"{tmp_path}/0002.png; and 1,002 more",
        f"1 passed over (UTF-16: save it as UTF-8): {tmp_path}/wide.txt",
    ]


def test_broken_records_stop_the_run_with_their_files_and_lines(tmp_path):
    good = [{"text": f"text {i}"} for i in range(20)]
    first = write(tmp_path / "a.jsonl", *good, "no\n", {"text": 3})
    second = write(tmp_path / "b.jsonl", {"words": "a"}, *[{"text": ""}] * 1234, *good)
    with pytest.raises(InputError) as error:
        load_data([first, second], BYTES, seq_len=8)
    said = (
        f"1,237 broken records: {first}:21 is not JSON: Expecting value at character 1 of the line; "
        f"{first}:22 text must be a string, got a number; "
        f"{second}:1 must have one of text, prompt and completion, or messages, got words; "
        "and 1,234 more"
    )
    assert str(error.value) == f"{said}; mend them, name their fields with --columns, or leave them out with --skip-bad"
    report = load_data([first, second], BYTES, seq_len=8, skip_bad=True).report
    assert (report.train_documents + report.evaluation_documents, len(report.broken)) == (40, 1237)
    assert str(report).splitlines()[-1] == f"skipped: {said}"


def test_what_the_template_does_not_write_is_said(tmp_path):
    class Plain(ToyTokenizer):
        def chat(self, messages, *, tools=None):
            return super().chat(messages)._replace(unwritten=("tools",) if tools else ())

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{"messages": messages}, {"messages": messages, "tools": [{"name": "look"}]}] * 20
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    report = load_data([path], Plain(), seq_len=32).report
    assert str(report).splitlines()[-1] == "not used, as the chat template does not write it: tools of 20 conversations"


def test_reasons_are_on_one_line(tmp_path):
    refused = [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path / "a.jsonl", {"messages": refused})
    with pytest.raises(InputError, match="1 broken record: .*a.jsonl:1 no such role: tool; mend"):
        load_data([path], BYTES, seq_len=8)
    with pytest.raises(InputError, match="no document to train on: 1 broken record: .*a.jsonl:1 no such role: tool$"):
        load_data([path], BYTES, seq_len=8, skip_bad=True)


@pytest.mark.parametrize(
    ("text", "seq_len", "parts", "message"),
    [
        ("abc", 8, 1, "the evaluation text is less than one sequence"),
        ("a", 8, 1, "the training text is less than one sequence"),
        ("a" * 300, 8, 5, "the evaluation text makes 4 sequences, fewer than one for each of the 5 devices"),
    ],
)
def test_too_little_text(tmp_path, text, seq_len, parts, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        load_data([tmp_path / "a.txt"], BYTES, seq_len=seq_len, parts=parts)


def test_completions_beyond_a_short_sequence_are_too_little(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"prompt": "p" * 8, "completion": "c"}] * 20)
    with pytest.raises(InputError, match="training text is less than one .* longer --seq-len"):
        load_data([path], BYTES, seq_len=8)
    load_data([path], BYTES, seq_len=9)


def test_loading_twice_gives_the_same(tmp_path):
    for document in DOCUMENTS:
        (tmp_path / document.name).write_text(document.text)
    first, second = (load_data([tmp_path], ToyTokenizer(), seq_len=32) for _ in range(2))
    for ours, theirs in zip((*first.train[:3], *first.evaluation[:3]), (*second.train[:3], *second.evaluation[:3])):
        assert np.array_equal(ours, theirs)
    assert first.report == second.report
    assert np.count_nonzero(first.train.tokens_NT == EOS) == first.report.train_documents


def test_an_epoch_is_each_sequence_once_and_the_next_is_in_another_order():
    iterator = iter(training_batches(DATA, batch_size=5, seed=0))
    batch = next(iter(training_batches(DATA, batch_size=5, seed=0)))
    assert [array.dtype for array in batch] == [np.int32, np.int32, bool]
    assert batch.segments_BT.shape == (5, 4) and batch.learned_BT[:, 1:].all() and not batch.learned_BT[:, 0].any()
    epochs = [sum(take(iterator, 2), []) for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_batches_are_a_function_of_the_seed():
    first, again, other = (take(iter(training_batches(DATA, batch_size=4, seed=seed)), 8) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("batch_size", [slow(4), 12, slow(20)])
@pytest.mark.parametrize("processes", [slow(2), 4])
def test_a_batch_has_the_same_sequences_however_many_processes_there_are(batch_size, processes):
    alone = take(iter(training_batches(DATA, batch_size=batch_size, seed=0)), 12)
    shares = [
        take(iter(training_batches(DATA, batch_size=batch_size, seed=0, process=i, processes=processes)), 12)
        for i in range(processes)
    ]
    assert all(len(rows) == batch_size // processes for share in shares for rows in share)
    assert [sorted(sum(rows, [])) for rows in zip(*shares)] == [sorted(rows) for rows in alone]
    assert [sorted(rows[0] * processes) for rows in zip(*shares)] != [sorted(rows) for rows in alone]


def test_fewer_sequences_than_a_batch_are_repeated():
    rows = take(iter(training_batches(DATA._replace(train=numbered(3)), batch_size=8, seed=0)), 3)
    assert [len(row) for row in rows] == [8, 8, 8]
    assert np.bincount(sum(rows, [])).tolist() == [8, 8, 8]


@pytest.mark.parametrize("passed", [0, 2, slow(1), slow(3), slow(7)])
@pytest.mark.parametrize(("process", "processes"), [(0, 1), (1, 2)])
def test_a_state_continues_with_the_very_next_batch(passed, process, processes):
    def start(seed=0):
        return iter(training_batches(DATA, batch_size=4, seed=seed, process=process, processes=processes))

    iterator = start()
    take(iterator, passed)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = take(iterator, 8)
    resumed = start()
    next(resumed)
    resumed.set_state(state)
    assert take(resumed, 8) == rest
    assert take(start(), 8) != rest or passed == 0
    other = start(seed=1)
    other.set_state(state)
    assert take(other, 8) != rest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 4, "processes": 3}, "batch_size must be a multiple of the 3 processes, got 4"),
        ({"batch_size": 4, "process": 2, "processes": 2}, "process must be from 0 to one less than the 2"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_batches_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        training_batches(DATA, seed=0, **arguments)


@pytest.mark.parametrize(
    ("batch_size", "parts", "shape"),
    [(2, 1, (6, 2)), (1, 1, (13, 1)), (64, 1, (1, 13)), (64, 4, (1, 12)), (4, 4, (3, 4))],
)
def test_evaluation_sequences_are_fixed_and_each_once(batch_size, parts, shape):
    batches = evaluation_batches(DATA, batch_size=batch_size, parts=parts)
    assert batches.tokens_BT.shape == batches.segments_BT.shape == batches.learned_BT.shape == (*shape, 4)
    chosen = sum(numbers(batches), [])
    assert len(set(chosen)) == len(chosen)
    assert min(chosen) == 0 and max(chosen) == 12
