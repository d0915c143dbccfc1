"""A long document costs few bytes of memory per byte of text, and has the same tokens in parts as at once."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from toy_tokenizer import ToyTokenizer

from adalomo_jax.text import packing
from adalomo_jax.text.documents import Document
from adalomo_jax.text.packing import tokenize

MOST = 8
"""Limit on bytes of memory per byte of the text, including the packed sequences."""
SENTENCE = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer\n"
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
SCRIPT = """
import re, sys
from pathlib import Path
from adalomo_jax.text.data import load_data
from adalomo_jax.pretrained import ByteTokenizer
from adalomo_jax.pretrained.tokenizer_files import read_tokenizer
# Not getrusage: its peak is that of the process which started this one, if that is larger.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
tokenizer = read_tokenizer(Path(sys.argv[2])) if sys.argv[2:] else ByteTokenizer()
tokenizer.encode(["once, so that the library has its threads"])
before = peak()
tokens = load_data([Path(sys.argv[1])], tokenizer, seq_len=1024).report.train_tokens
print(peak() - before, tokens)
"""


def record(kind, size):
    text = SENTENCE * (size // len(SENTENCE))
    half = len(text) // 2
    if kind.startswith("emoji"):  # with an emoji, Python takes four bytes for each character of a text
        text = f"{text[:half]}\N{GRINNING FACE}{text[half:-1]}\N{GRINNING FACE}"
    if kind == "emoji":
        return {"text": text}
    if kind in ("messages", "emoji messages"):
        half += 1
        return {"messages": [{"role": "user", "content": text[:half]}, {"role": "assistant", "content": text[half:]}]}
    return {"text": text} if kind == "text" else {"prompt": text[:half], "completion": text[half:]}


def write_tokenizer(folder):
    """A tokenizer whose tokens are words, as in those of models: BPE on bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([SENTENCE] * 4, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize(
    ("kind", "size", "has_words"),
    [
        ("text", 10**8, False),
        ("completion", 10**8, False),
        ("text", 10**8, True),
        ("messages", 2 * 10**7, True),
        ("emoji", 2 * 10**7, True),
        ("emoji messages", 2 * 10**7, True),
    ],
)
def test_memory_of_a_long_line(tmp_path, kind, size, has_words):
    path = tmp_path / "long.jsonl"
    small = json.dumps(record(kind, 2 * len(SENTENCE)))
    path.write_text(f"{json.dumps(record(kind, size))}\n{small}\n")
    arguments = [path, write_tokenizer(tmp_path / "tokenizer")] if has_words else [path]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
    taken, tokens = map(int, done.stdout.split())
    assert tokens > size / (12 if has_words else 2.5)
    assert 1 < taken / path.stat().st_size <= MOST


@pytest.mark.parametrize("learned", [None, ((3, 9), (20, 21), (22, 70))])
@pytest.mark.parametrize("formatted", [False, True])
def test_a_document_in_parts_is_the_same(monkeypatch, learned, formatted):
    documents = [
        Document("a", "To be, é 日本 or not to be</s> that is the question: whether 'tis nobler", learned, formatted)
    ]
    whole = tokenize(documents * 2, ToyTokenizer())
    monkeypatch.setattr(packing, "CHUNK", 10)
    parts = tokenize(documents * 2, ToyTokenizer())
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts))
    assert 0 < whole.learned.sum() <= len(whole.tokens)


def test_a_text_that_ends_itself_gets_no_second_end(monkeypatch):
    documents = [Document("a", "To be</s>", ((0, 2),)), Document("b", "</s>"), Document("c", "")]
    for chunk in (2**10, 1):
        monkeypatch.setattr(packing, "CHUNK", chunk)
        made = tokenize(documents, ToyTokenizer())
        assert np.diff(made.ends, prepend=0).tolist() == [7, 2, 2]
        assert made.learned.tolist() == [False, True, True, False, False, False, True, True, True, True, True]
