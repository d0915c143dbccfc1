"""Tokenizers and GGUF files that are small enough to make in a test."""

import json

import gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = ["the cat sat on the mat", "the 12 cats and the 345 hats", "a bad man had a cat", "it's the man's hat"] * 4
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def byte_level(*, bos=False, trim_offsets=False):
    """Train a tokenizer on ``TEXT``; tokens 0 and 1 are ``<|im_start|>`` and ``<|im_end|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
        )
    return tokenizer


def write_gguf(path, **fields):
    """Write a file with the fields ``tokenizer.ggml.*`` (except ``chat_template``) and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        key = "tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level_fields(**changes):
    """Return the fields of ``byte_level()`` in a GGUF file, with a user-defined token."""
    model = json.loads(byte_level().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [CONTROL] * 2 + [NORMAL] * (len(tokens) - 2)
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*tokens, "<think>"],
        "token_type": [*types, USER_DEFINED],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "chat_template": CHATML,
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def sentencepiece_fields(**changes):
    """Return a vocabulary as SentencePiece writes it: special tokens, bytes, pieces with scores, characters."""
    pieces = ["▁t", "he", "▁the", "▁c", "at", "▁cat", "in"]
    characters = ["▁", *"theca"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *characters]
    others = len(tokens) - 3 - 256
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(i) for i in range(others)],
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * others,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def write_config(folder, file="tokenizer_config.json", **config):
    """Write a file into a tokenizer's folder."""
    (folder / file).write_text(json.dumps(config))
