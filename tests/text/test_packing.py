"""Packing keeps borders and learned marks, and loses or doubles no token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_tokenizer import BOS, EOS, ToyTokenizer

from adalomo_jax.text import packing
from adalomo_jax.text.documents import Document, document_of
from adalomo_jax.text.packing import Tokenized, best_fit, pack, tokenize


def numbered(lengths, learned=None):
    """Documents of these lengths, whose tokens count up from 0, so that each occurs only once."""
    total = sum(lengths)
    learned = np.ones(total, bool) if learned is None else np.array(learned, bool)
    return Tokenized(np.arange(total, dtype=np.uint32), learned, np.cumsum(lengths, dtype=np.int64))


def segments(packed):
    """The tokens and learned marks of each segment; the sequences must hold nothing else."""
    for tokens, numbers, learned in zip(packed.tokens_NT, packed.segments_NT, packed.learned_NT):
        used = np.flatnonzero(numbers)
        assert np.array_equal(used, np.arange(len(used)))
        assert not tokens[len(used) :].any() and not learned[len(used) :].any()
        steps = np.diff(numbers[used].astype(int))
        assert numbers[0] == 1 and set(steps) <= {0, 1}
        borders = np.flatnonzero(steps) + 1
        yield from zip(np.split(tokens[used], borders), np.split(learned[used], borders))


def check(packed, tokenized):
    """A token occurs once or is dropped; a segment is consecutive tokens of one document; only first marks change."""
    seen = []
    for tokens, learned in segments(packed):
        assert np.array_equal(tokens, np.arange(tokens[0], tokens[0] + len(tokens)))
        document = np.searchsorted(tokenized.ends, tokens, side="right")
        assert document[0] == document[-1]
        assert not learned[0] and learned.any()
        assert np.array_equal(learned[1:], tokenized.learned[tokens[1:]])
        seen.extend(tokens.tolist())
    assert len(seen) == len(set(seen)) == packed.tokens
    assert packed.tokens + packed.short + packed.unlearned == len(tokenized.tokens)


@st.composite
def documents(draw):
    lengths = draw(st.lists(st.integers(0, 40), max_size=30))
    total = sum(lengths)
    learned = draw(st.none() | st.lists(st.booleans(), min_size=total, max_size=total))
    return numbered(lengths, learned)


@given(documents(), st.integers(2, 17))
def test_each_token_is_in_one_sequence_or_dropped(tokenized, seq_len):
    packed = pack(tokenized, seq_len)
    assert packed.tokens_NT.shape == packed.segments_NT.shape == packed.learned_NT.shape == (packed.sequences, seq_len)
    check(packed, tokenized)


@pytest.mark.parametrize(
    "change", ["merge segments", "drop a token", "another token", "learn a first token", "padding"]
)
def test_the_check_finds_what_is_wrong(change):
    tokenized = numbered([5, 3, 7])
    packed = pack(tokenized, 8)
    check(packed, tokenized)
    if change == "merge segments":
        packed.segments_NT[packed.segments_NT == 2] = 1
    elif change == "drop a token":
        packed.segments_NT[1, -1] = 0
    elif change == "another token":
        packed.tokens_NT[0, 0] = 14
    elif change == "learn a first token":
        packed.learned_NT[0, 0] = True
    else:
        packed.tokens_NT[-1, -1] = 1
    with pytest.raises(AssertionError):
        check(packed, tokenized)


def test_long_documents_are_cut_into_consecutive_pieces():
    packed = pack(numbered([19]), 8)
    assert sorted(tokens.tolist() for tokens, _ in segments(packed)) == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 19)),
    ]


def test_what_is_dropped_is_counted():
    learned = np.ones(9 + 8 + 1 + 4, bool)
    learned[9:16] = False  # the first piece of the second document
    learned[18:22] = [True, False, False, False]  # only its first token, which cannot be predicted
    packed = pack(numbered([9, 8, 1, 4], learned), 4)
    assert (packed.short, packed.unlearned) == (2, 8)
    assert packed.tokens == 22 - 10


@given(st.lists(st.integers(2, 64), max_size=100))
def test_best_fit_fills_sequences_well(lengths):
    sequences = best_fit(np.array(lengths, int), 64)
    assert sorted(piece for sequence in sequences for piece in sequence) == list(range(len(lengths)))
    filled = [sum(lengths[piece] for piece in sequence) for sequence in sequences]
    assert all(room <= 64 for room in filled)
    # No piece that opened a sequence has room in an earlier one.
    first = [lengths[sequence[0]] for sequence in sequences]
    assert all(filled[i] + first[j] > 64 for i in range(len(sequences)) for j in range(i + 1, len(sequences)))


def test_short_documents_leave_little_padding():
    lengths = np.random.default_rng(0).integers(2, 200, 2000).tolist()
    assert pack(numbered(lengths), 256).padding < 0.01
    assert pack(numbered(lengths[:1]), 256).padding == pytest.approx(1 - lengths[0] / 256)


def test_the_smallest_types_are_held_and_batches_are_int32():
    packed = pack(numbered([5, 3, 7]), 8)
    assert packed.segments_NT.dtype == np.uint8
    batch = packed.take(np.array([[0, 1]]))
    assert [array.dtype for array in batch] == [np.int32, np.int32, bool]
    assert all(array.shape == (1, 2, 8) for array in batch)
    assert tokenize([Document("a", "text")], ToyTokenizer(special=False)).tokens.dtype == np.uint8
    assert tokenize([Document("a", "text")], ToyTokenizer()).tokens.dtype == np.uint16


def learned_text(record, tokenizer):
    """The text of a record's learned tokens, and that of its other tokens."""
    tokens, learned, _ = tokenize([document_of(record, "a", tokenizer)], tokenizer)
    return tokenizer.decode(tokens[learned]), tokenizer.decode(tokens[~learned])


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hö"}]


@pytest.mark.parametrize(
    ("record", "special", "learned", "read"),
    [
        ({"text": "ä text"}, False, "ä text", ""),
        ({"text": "ä text"}, True, "<s>ä text</s>", ""),
        ({"prompt": "ä", "completion": " öü"}, False, " öü", "ä"),
        ({"prompt": "ä", "completion": " öü"}, True, " öü</s>", "<s>ä"),
        ({"messages": [*CHAT, *CHAT]}, True, "hö</s>hö</s>", "user:hi|assistant:|user:hi|assistant:|"),
    ],
)
def test_what_is_learned(record, special, learned, read):
    assert learned_text(record, ToyTokenizer(special)) == (learned, read)


def test_a_token_that_overlaps_the_completion_is_learned():
    class Pairs(ToyTokenizer):
        """Each token stands for two characters."""

        def encode(self, texts, *, add_special=True):
            encoded = super().encode(texts, add_special=False)
            return [type(e)(e.tokens[::2], np.stack([e.spans[::2, 0], e.spans[1::2, 1]], -1)) for e in encoded]

    tokenized = tokenize([Document("a", "abcdef", ((3, 5),))], Pairs(special=False))
    assert tokenized.learned.tolist() == [False, True, True]


def test_a_document_that_its_tokenizer_ends_is_ended_once():
    tokens = tokenize([Document("a", "ab</s>", ((0, 1),))], ToyTokenizer())
    assert tokens.tokens.tolist() == [BOS, *b"ab", EOS]
    assert tokens.learned.tolist() == [False, True, False, True]


@pytest.mark.parametrize("chunk", [1, 10, 10**6])
def test_documents_stay_in_order_however_many_are_tokenized_at_once(chunk, monkeypatch):
    made = [Document(str(i), f"document {i}" * (i % 5), None, formatted=i % 3 == 0) for i in range(40)]
    tokenizer, tokens = ToyTokenizer(), []
    for document in made:
        bos, eos = ([], []) if document.formatted else ([BOS], [EOS])
        tokens.append([*bos, *document.text.encode(), *eos])
    monkeypatch.setattr(packing, "CHUNK", chunk)
    tokenized = tokenize(made, tokenizer)
    assert tokenized.tokens.tolist() == sum(tokens, [])
    assert tokenized.ends.tolist() == np.cumsum(list(map(len, tokens))).tolist()


def test_the_vocabulary_is_counted_once():
    class Counting(ToyTokenizer):
        counted = 0

        @property
        def vocab_size(self):
            self.counted += 1
            return 258

        @vocab_size.setter
        def vocab_size(self, value):
            pass

    tokenizer = Counting()
    tokenize([Document("a", "text")] * 10, tokenizer)
    assert tokenizer.counted == 1


def test_tokens_that_the_vocabulary_does_not_have_are_refused():
    tokenizer = ToyTokenizer()
    tokenizer.vocab_size = 257
    with pytest.raises(ValueError, match="tokens must be from 0 to the 257 .* got 257 in a"):
        tokenize([Document("a", "text")], tokenizer)


def test_no_documents_are_no_sequences():
    assert pack(tokenize([], ToyTokenizer()), 8).sequences == 0
