"""Tokenizers round-trip text, cover it with spans, read Hugging Face folders, and refuse bad input."""

import pickle

import numpy as np
import pytest
from small_tokenizers import CHATML, byte_level, write_config
from tokenizers import Tokenizer as Tokenizers
from tokenizers import models

from adalomo_jax.pretrained import ByteTokenizer, Encoded, TextTokenizer, Tokenizer, read_tokenizer
from adalomo_jax.pretrained import tokenizer as tokenizer_module

TEXTS = ["the cat's 12 hats", " two  spaces\n\n\tand é, 日本 and 👍🏽", "<|im_start|>the<|im_end|>", "", " "]
BOTH: list[Tokenizer] = [ByteTokenizer(), TextTokenizer(byte_level())]
MESSAGES = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "the mat"}]


@pytest.fixture
def folder(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, eos_token="<|im_end|>", bos_token={"content": "<|im_start|>"}, chat_template=CHATML)
    return tmp_path


def assert_spans_cover(text, encoded):
    """The spans are in order, without gaps, to the end; each stands for some text."""
    end = 0
    for start, stop in encoded.spans.tolist():
        assert start <= end <= stop and start < stop
        end = stop
    assert end == len(text)


@pytest.mark.parametrize("text", [*TEXTS, "\0\x7f", "e\u0301"])
def test_bytes_are_the_utf8_of_the_text(text):
    encoded = ByteTokenizer().encode([text])[0]
    assert encoded.tokens.tolist() == list(text.encode())
    assert encoded.tokens.dtype == encoded.spans.dtype == np.int32
    assert [text[start:end] for start, end in encoded.spans.tolist()] == [c for c in text for _ in c.encode()]
    assert ByteTokenizer().decode(encoded.tokens) == text


def test_a_token_that_is_no_byte_is_no_text():
    """A preset with random weights reads bytes, but may have more tokens than bytes, and draw them."""
    assert ByteTokenizer().decode([97, 49151, 195, 169]) == "a\N{REPLACEMENT CHARACTER}é"


def test_bytes_that_are_no_text_are_replaced():
    assert ByteTokenizer().decode([0xC3, 33]) == "\ufffd!"
    with pytest.raises(ValueError, match="bytes have no chat template"):
        ByteTokenizer().chat(MESSAGES)


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_text_comes_back_and_spans_cover_it(tmp_path, trim_offsets):
    byte_level(trim_offsets=trim_offsets).save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path)
    for text, encoded in zip(TEXTS, tokenizer.encode(TEXTS)):
        assert encoded.tokens.dtype == encoded.spans.dtype == np.int32
        assert encoded.spans.shape == (len(encoded.tokens), 2)
        assert_spans_cover(text, encoded)
        assert tokenizer.decode(encoded.tokens) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")


def test_trimmed_spans_would_not_cover():
    encoding = byte_level(trim_offsets=True).encode(" two  spaces")
    with pytest.raises(AssertionError):
        assert_spans_cover(" two  spaces", Encoded(np.array(encoding.ids), np.array(encoding.offsets)))


def test_a_token_is_the_text_of_its_span(folder):
    tokenizer = read_tokenizer(folder)
    encoded = tokenizer.encode(["the cat<|im_end|>"])[0]
    assert [tokenizer.tokenizer.id_to_token(token) for token in encoded.tokens.tolist()] == [
        "the",
        "Ġcat",
        "<|im_end|>",
    ]
    assert encoded.spans.tolist() == [[0, 3], [3, 7], [7, 17]]


def test_bos_is_added_where_it_is_asked_for_and_stands_for_no_text(tmp_path):
    byte_level(bos=True).save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path)
    with_bos, without = (tokenizer.encode(["the"], add_special=special)[0] for special in (True, False))
    assert with_bos.tokens.tolist() == [0, *without.tokens.tolist()]
    assert with_bos.spans.tolist() == [[0, 0], [0, 3]]


def test_a_folder_has_special_tokens_and_a_template(folder):
    tokenizer = read_tokenizer(folder)
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)
    assert tokenizer.vocab_size == tokenizer.tokenizer.get_vocab_size()
    chat = tokenizer.chat(MESSAGES)
    assert [chat.text[start:end] for start, end in chat.learned] == ["the mat<|im_end|>"]
    assert chat.text.startswith(tokenizer.prompt(MESSAGES[:1]))
    assert 1 in tokenizer.encode([chat.text], add_special=False)[0].tokens


def test_truncation_and_padding_are_off(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(tokenizer.encode("the cat sat on").ids) == 50
    long, short = read_tokenizer(tmp_path).encode(["the cat sat on", "the"])
    assert long.tokens.tolist() == byte_level().encode("the cat sat on").ids and len(long.tokens) > 3
    assert len(short.tokens) == 1


def test_the_template_of_tools_is_taken_for_them(folder, tmp_path):
    template = "{{ tools[0].name }}{% for m in messages %}{{ m.content }}{% endfor %}"
    named = [{"name": "tool_use", "template": template}, {"name": "default", "template": "one"}]
    write_config(folder, chat_template=named)
    copy = tmp_path / "copy"
    copy.mkdir()
    read_tokenizer(folder).save(copy)
    for tokenizer in (read_tokenizer(folder), read_tokenizer(copy)):
        assert tokenizer.chat(MESSAGES, tools=[{"name": "look"}]).text.startswith("look")
        assert tokenizer.chat(MESSAGES).text == "one"


def test_the_templates_of_a_folder(folder):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "one"}]
    write_config(folder, chat_template=named)
    assert read_tokenizer(folder).chat(MESSAGES).text == "one"
    (folder / "chat_template.jinja").write_text("two")
    assert read_tokenizer(folder).chat(MESSAGES).text == "two"


def test_what_is_saved_is_read_back(folder, tmp_path):
    tokenizer, copy = read_tokenizer(folder), tmp_path / "copy"
    copy.mkdir()
    tokenizer.save(copy)
    again = read_tokenizer(copy)
    assert (again.eos, again.bos, again.vocab_size) == (tokenizer.eos, tokenizer.bos, tokenizer.vocab_size)
    assert again.chat(MESSAGES) == tokenizer.chat(MESSAGES)
    for old, new in zip(tokenizer.encode(TEXTS), again.encode(TEXTS)):
        assert np.array_equal(old.tokens, new.tokens) and np.array_equal(old.spans, new.spans)


def test_a_tokenizer_can_be_sent_to_another_process(folder):
    tokenizer = read_tokenizer(folder)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(TEXTS[:1])[0].tokens.tolist() == tokenizer.encode(TEXTS[:1])[0].tokens.tolist()
    assert again.chat(MESSAGES) == tokenizer.chat(MESSAGES)


def joined(parts):
    return [np.concatenate(arrays).tolist() for arrays in zip(*parts)]


LONG = "".join(f"the cat's {i} hats, and\n\tsat  on é 日本 {i * i} mats.\n" for i in range(300))


@pytest.mark.parametrize("tokenizer", BOTH, ids=["bytes", "text"])
def test_a_text_in_parts_has_the_same_tokens(monkeypatch, tokenizer):
    monkeypatch.setattr(tokenizer_module, "WINDOW", 1000)
    monkeypatch.setattr(tokenizer_module, "OVERLAP", 300)
    for text in (LONG, LONG[:999], LONG[:1000], LONG[:1001], "a", ""):
        parts = list(tokenizer.parts(text))
        assert joined(parts) == joined(tokenizer.encode([text]))
        assert len(parts) > 5 or len(text) < 2000


def test_what_stands_around_a_text_in_parts_stands_there_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "WINDOW", 1000)
    monkeypatch.setattr(tokenizer_module, "OVERLAP", 300)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    write_config(
        tmp_path,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        tokenizer_class="LlamaTokenizerFast",
        add_eos_token=True,
    )
    tokenizer = read_tokenizer(tmp_path)
    for text in (LONG, f"<|im_start|>{LONG}<|im_end|>"):
        tokens = joined(tokenizer.parts(text))[0]
        assert tokens == tokenizer.encode([text])[0].tokens.tolist()
        assert tokens.count(0) == tokens.count(1) == 1
    assert joined(tokenizer.parts(LONG, add_special=False)) == joined(tokenizer.encode([LONG], add_special=False))


def test_a_text_whose_parts_do_not_agree_is_read_at_once(monkeypatch):
    """Every four letters, from the first on, are a token: a window that begins elsewhere has other tokens."""
    monkeypatch.setattr(tokenizer_module, "WINDOW", 1000)
    monkeypatch.setattr(tokenizer_module, "OVERLAP", 301)
    tokenizer = Tokenizers(models.BPE({"a": 0, "aa": 1, "aaaa": 2, "b": 3}, [("a", "a"), ("aa", "aa")]))
    text = "b" * 1900 + "a" * 4001
    parts = list(TextTokenizer(tokenizer).parts(text))
    assert joined(parts) == joined(TextTokenizer(tokenizer).encode([text]))
    assert len(parts) > 1 and len(parts[-1].tokens) > 900


@pytest.mark.parametrize("tokenizer", BOTH, ids=["bytes", "text"])
def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        tokenizer.encode(["fine", "\ud83d"])
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        list(tokenizer.parts("\ud83d"))


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("tokenizer.json", None, "has no tokenizer.json; transformers makes one"),
        ("tokenizer.json", "{", "tokenizer.json cannot be read: Expecting"),
        ("tokenizer.json", "[]", "must hold a JSON object, got list"),
        ("tokenizer.json", '{"model": {"type": "new"}}', "tokenizer.json is no tokenizer"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', "the eos_token '</s>' is not in tokenizer.json"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "rag", "template": ""}]}', "the name 'default', got"),
        (
            "generation_config.json",
            '{"eos_token_id": "a"}',
            "eos_token_id must be a token or a list of tokens .*, got 'a'",
        ),
        (
            "generation_config.json",
            '{"eos_token_id": []}',
            "eos_token_id must be a token or a list of tokens .*, got \\[\\]",
        ),
        ("config.json", '{"bos_token_id": 100000}', "bos_token_id must be a token of the vocabulary, got 100000"),
        ("chat_template.jinja", b"\xff", "cannot read .*chat_template.jinja"),
        ("chat_template.jinja", b"a" * (2**20 + 1), "chat_template.jinja must be a regular file of at most 1,048,576"),
        ("generation_config.json", '{"eos_token_id": -1}', "generation_config.json: eos_token_id must be .*, got -1"),
        ("config.json", '{"eos_token_id": [1, 4294967296]}', "config.json: eos_token_id must be .*, got 4294967296"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "add_bos_token must be a valid boolean, got 'yes'"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"9": {"content": "<a>"}}}',
            "'<a>' must be 9, .* tokenizer.json it is",
        ),
        ("added_tokens.json", '{"<a>": 1.5}', "added_tokens.json: '<a>' must be the number of a token, got 1.5"),
    ],
)
def test_a_folder_that_is_refused(tmp_path, file, content, error):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=error) as raised:
        read_tokenizer(tmp_path)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_no_template_is_an_error_of_conversations_only():
    tokenizer = TextTokenizer(byte_level())
    with pytest.raises(ValueError, match="the checkpoint has no chat template"):
        tokenizer.chat(MESSAGES)
