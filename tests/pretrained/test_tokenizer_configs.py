"""The files beside `tokenizer.json` say which tokens are special, which end a text, and which are put around it."""

import pytest
from small_tokenizers import byte_level, write_config

from adalomo_jax.pretrained import read_tokenizer


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({}, None),
        ({"config.json": {"eos_token_id": 5}}, 5),
        ({"config.json": {"eos_token_id": 5}, "generation_config.json": {"eos_token_id": [7, 6]}}, 7),
        ({"generation_config.json": {"eos_token_id": 7}, "tokenizer_config.json": {"eos_token": "<|im_end|>"}}, 1),
        ({"generation_config.json": {"eos_token_id": 7}, "tokenizer_config.json": {"eos_token": None}}, 7),
    ],
)
def test_the_file_that_says_what_ends_a_document(tmp_path, files, eos):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for file, content in files.items():
        write_config(tmp_path, file, **content)
    assert read_tokenizer(tmp_path).eos == eos


@pytest.mark.parametrize(
    ("files", "stops"),
    [
        ({}, ()),
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, (1,)),
        ({"config.json": {"eos_token_id": 5}, "generation_config.json": {"eos_token_id": [7, 6]}}, (7, 6, 5)),
        (
            {"generation_config.json": {"eos_token_id": [7, 1]}, "tokenizer_config.json": {"eos_token": "<|im_end|>"}},
            (1, 7),
        ),
        ({"config.json": {"eos_token_id": [3, 3]}, "generation_config.json": {"eos_token_id": None}}, (3,)),
    ],
)
def test_generation_stops_at_each_token_that_a_file_names(tmp_path, files, stops):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for file, content in files.items():
        write_config(tmp_path, file, **content)
    assert read_tokenizer(tmp_path).stops == stops


LLAMA, GPT2, BASE = "LlamaTokenizerFast", "GPT2TokenizerFast", "PreTrainedTokenizerFast"


@pytest.mark.parametrize("before", [False, True], ids=["none-in-tokenizer-json", "bos-in-tokenizer-json"])
@pytest.mark.parametrize(
    ("config", "around"),
    [
        ({"tokenizer_class": LLAMA}, (1, 0)),
        ({"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}, (1, 1)),
        ({"tokenizer_class": LLAMA, "add_bos_token": False}, (0, 0)),
        ({"tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "add_eos_token": True}, (0, 1)),
        ({"tokenizer_class": "CohereTokenizerFast"}, (1, 0)),
        ({"tokenizer_class": "GPTNeoXTokenizerFast"}, (0, 0)),
        ({"tokenizer_class": "GPTNeoXTokenizerFast", "add_bos_token": True}, (1, 0)),
        ({"tokenizer_class": GPT2, "add_bos_token": True}, None),
        ({"tokenizer_class": BASE, "add_bos_token": True, "add_eos_token": True}, None),
        ({"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False}, None),
        ({"add_bos_token": True}, None),
        ({"tokenizer_class": LLAMA, "backend": "tokenizers"}, None),
    ],
)
def test_bos_and_eos_are_put_around_as_the_class_does_it(tmp_path, config, around, before):
    """If ``around`` is None, tokenizer.json decides."""
    byte_level(bos=before).save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, bos_token="<|im_start|>", eos_token="<|im_end|>", **config)
    (bos, eos), tokenizer = around or (int(before), 0), read_tokenizer(tmp_path)
    with_special, without = (tokenizer.encode(["the"], add_special=special)[0].tokens for special in (True, False))
    assert with_special.tolist() == [0] * bos + without.tolist() + [1] * eos


def test_a_class_that_adds_bos_needs_one(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, tokenizer_class=LLAMA)
    assert len(read_tokenizer(tmp_path).encode(["the"])[0].tokens) == 1
    write_config(tmp_path, tokenizer_class=LLAMA, add_bos_token=True)
    with pytest.raises(ValueError, match="add_bos_token is true, but no bos_token is named"):
        read_tokenizer(tmp_path)


def test_a_text_that_spells_out_what_is_added_gets_no_second_one(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    names = dict(bos_token="<|im_start|>", eos_token="<|im_end|>")
    write_config(tmp_path, tokenizer_class=LLAMA, add_eos_token=True, **names)
    texts = ["<|im_start|>the<|im_end|>", "the", "", "<|im_start|><|im_start|>", "<|im_start|>"]
    the = byte_level().encode("the").ids
    encoded = read_tokenizer(tmp_path).encode(texts)
    assert [e.tokens.tolist() for e in encoded] == [[0, *the, 1], [0, *the, 1], [0, 1], [0, 0, 1], [0, 1]]
    assert encoded[0].spans.tolist() == [[0, 12], [12, 15], [15, 25]]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_beside_tokenizer_json_are_tokens(tmp_path, file):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    size = byte_level().get_vocab_size()
    decoder = {
        str(size + 1): {"content": "<b>"},
        str(size): {"content": "<a>", "special": True},
        "1": {"content": "<|im_end|>"},
    }
    added = {"<b>": size + 1, "<a>": size, "<|im_end|>": 1}
    write_config(tmp_path, file, **(added if file == "added_tokens.json" else {"added_tokens_decoder": decoder}))
    tokenizer = read_tokenizer(tmp_path)
    the = byte_level().encode("the").ids
    assert tokenizer.encode(["the<a>the<b>"])[0].tokens.tolist() == [*the, size, *the, size + 1]
    assert tokenizer.vocab_size == size + 2


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_tokens_that_are_named_special_are_found_in_a_text(tmp_path, file):
    """A named word of the vocabulary becomes one and takes the spaces it declares; a word without a row does not."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    ids = byte_level().get_vocab()
    named = [{"content": "cat", "lstrip": True, "normalized": False}, "sat", "<new>"]
    write_config(tmp_path, file, pad_token="at", additional_special_tokens=named)
    tokenizer = read_tokenizer(tmp_path)
    tokens = tokenizer.encode(["a cat sat at<new>"])[0].tokens.tolist()
    pieces = [byte_level().encode(text).ids for text in ("a", " ", " ", "<new>")]
    assert tokens == [*pieces[0], ids["cat"], *pieces[1], ids["sat"], *pieces[2], ids["at"], *pieces[3]]
    assert tokenizer.decode([ids["cat"], ids["at"]]) == ""
    assert tokenizer.vocab_size == byte_level().get_vocab_size()


def test_the_map_is_not_read_beside_added_tokens(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, "special_tokens_map.json", eos_token="<|im_start|>")
    write_config(tmp_path, eos_token="<|im_end|>")
    assert read_tokenizer(tmp_path).eos == 0
    write_config(tmp_path, eos_token="<|im_end|>", added_tokens_decoder={})
    assert read_tokenizer(tmp_path).eos == 1


@pytest.mark.parametrize(("config", "adds"), [({}, False), ({"add_prefix_space": True}, True), (None, True)])
def test_a_space_before_a_text_is_up_to_the_configuration(tmp_path, config, adds):
    tokenizer = byte_level()
    tokenizer.pre_tokenizer.add_prefix_space = True
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, **({"tokenizer_class": LLAMA} if config is None else config))
    text = " the" if adds else "the"
    assert read_tokenizer(tmp_path).encode(["the"])[0].tokens.tolist() == byte_level().encode(text).ids
