"""Tokenizers and chat templates match Hugging Face's transformers on the same files. Needs transformers alone."""

import importlib.metadata
import importlib.util
import json

import pytest
from small_tokenizers import CHATML, byte_level

from adalomo_jax.pretrained import read_tokenizer

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers", allow_module_level=True)
pytestmark = pytest.mark.slow

VERSION = int(importlib.metadata.version("transformers").split(".")[0])
CLASSES = ["LlamaTokenizer", "LlamaTokenizerFast", "CohereTokenizerFast", "GPTNeoXTokenizerFast", "GPT2TokenizerFast"]
CLASSES += ["PreTrainedTokenizerFast", "Qwen2Tokenizer"]
TEXTS = ["the cat's 12 hats", " two  spaces", "<|im_end|>the", ""]
TOOLS = [{"type": "function", "function": {"name": "look", "description": "é <b>", "parameters": {"type": "object"}}}]
MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the cat?\n"}]


@pytest.fixture
def make(tmp_path):
    def write(before=False, **config):
        byte_level(bos=before).save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|im_end|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | config))
        return tmp_path

    return write


def theirs(folder):
    from transformers import AutoTokenizer  # pyright: ignore[reportMissingImports]

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}])
@pytest.mark.parametrize("name", CLASSES)
def test_bos_and_eos_are_put_around_as_they_do(make, tmp_path, name, flags, before):
    """Transformers 5 does not read the flags beside a tokenizer.json: the test compares with the files it writes."""
    folder = make(before, tokenizer_class=name, **flags)
    tokenizer = theirs(folder)
    if VERSION >= 5:
        folder = tmp_path / "again"
        tokenizer.save_pretrained(folder)
    ours = read_tokenizer(folder).encode(TEXTS)
    assert [one.tokens.tolist() for one in ours] == [tokenizer(text)["input_ids"] for text in TEXTS]


NAMED = {
    "additional": {"additional_special_tokens": ["cat", {"__type": "AddedToken", "content": "sat", "lstrip": True}]},
    "role": {"pad_token": "at", "cls_token": {"__type": "AddedToken", "content": "the", "single_word": True}},
    "space": {"add_prefix_space": True},
    "decoder": {"added_tokens_decoder": {"1": {"content": "<|im_end|>", "lstrip": True, "special": True}}},
}
MAPS = {"none": None, "eos": {"eos_token": "<|im_start|>"}, "additional": {"additional_special_tokens": ["bad", "it"]}}
SPELLED = ["the bad cat sat at the mat, 12 hats<|im_end|> ", "<|im_end|>cat it bathe at", "the"]


@pytest.mark.skipif(VERSION >= 5, reason="transformers 5 reads other files")
@pytest.mark.parametrize("file", MAPS)
@pytest.mark.parametrize(
    ("name", "named"),
    # Llama's class rebuilds itself from a slow one if it is told of a space.
    [*(("PreTrainedTokenizerFast", x) for x in NAMED), *(("LlamaTokenizerFast", x) for x in NAMED if x != "space")],
)
def test_named_tokens_are_found_as_they_are(make, name, named, file):
    folder = make(tokenizer_class=name, **NAMED[named])
    if MAPS[file] is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(MAPS[file]))
    tokenizer, ours = theirs(folder), read_tokenizer(folder)
    assert [one.tokens.tolist() for one in ours.encode(SPELLED)] == [tokenizer(text)["input_ids"] for text in SPELLED]
    assert (ours.bos, ours.eos) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


TEMPLATES = {
    "chatml": CHATML,
    "tools": "{% for t in tools or [] %}{{ t | tojson(indent=2) }}\n{% endfor %}" + CHATML,
    "filters": "{{ messages | map(attribute='content') | join('|') | trim | upper }}{{ bos_token }}{{ tools is none }}",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_is_the_one_that_they_make(make, template):
    tokenizer = theirs(make(tokenizer_class="PreTrainedTokenizerFast", chat_template=TEMPLATES[template]))
    options = dict(tokenize=False, add_generation_prompt=True)
    ours = read_tokenizer(make(tokenizer_class="PreTrainedTokenizerFast", chat_template=TEMPLATES[template]))
    assert ours.prompt(MESSAGES) == tokenizer.apply_chat_template(MESSAGES, **options)
    said = [*MESSAGES, {"role": "assistant", "content": "the mat"}]
    text = tokenizer.apply_chat_template(said, tools=TOOLS, tokenize=False)
    if template != "filters":  # "filters" has no separate answer
        assert ours.chat(said, tools=TOOLS).text == text
