"""A long document costs few bytes of memory for each of its own; its tokens are those that it has at once."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy_tokenizer import ToyTokenizer

from adalomo_jax.finetune import packing
from adalomo_jax.finetune.documents import Document
from adalomo_jax.finetune.packing import tokenize

MOST = 8
"""Bytes of memory for each byte of the text, packed sequences and all."""
SENTENCE = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer\n"
SCRIPT = """
import re, sys
from pathlib import Path
from adalomo_jax.finetune.data import load_data
from adalomo_jax.pretrained import ByteTokenizer
# Not getrusage: its peak is that of the process which started this one, if that is larger.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
tokens = load_data([Path(sys.argv[1])], ByteTokenizer(), seq_len=1024).report.train_tokens
print(peak() - before, tokens)
"""


def record(kind, size):
    text = SENTENCE * (size // len(SENTENCE))
    half = len(text) // 2
    return {"text": text} if kind == "text" else {"prompt": text[:half], "completion": text[half:]}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize("kind", ["text", "completion"])
def test_memory_of_a_long_line(tmp_path, kind):
    path = tmp_path / "long.jsonl"
    small = json.dumps({"prompt": "1 + 1 = ", "completion": "2"})
    path.write_text(f"{json.dumps(record(kind, 100_000_000))}\n{small}\n")
    done = subprocess.run([sys.executable, "-c", SCRIPT, path], capture_output=True, text=True, check=True)
    taken, tokens = map(int, done.stdout.split())
    assert tokens > 40_000_000
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
