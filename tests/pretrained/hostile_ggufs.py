"""Wrong claims that a GGUF file may make."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hostile_models import SIZES, Case, tensors
from small_models import gguf_name

_TYPES = {bool: 7, str: 8, list: 9, int: 4, float: 6}
_TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
GGUF_FIELDS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.embedding_length": SIZES.hidden_size,
    "llama.feed_forward_length": SIZES.intermediate_size,
    "llama.block_count": SIZES.num_hidden_layers,
    "llama.context_length": SIZES.max_position_embeddings,
    "llama.attention.head_count": SIZES.num_attention_heads,
    "llama.attention.head_count_kv": SIZES.num_key_value_heads,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": SIZES.head_dim,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": _TOKENS,
    "tokenizer.ggml.scores": [0.0] * 6,
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def typed(value: Any) -> bytes:
    """Put the type before a value; bytes have theirs already."""
    return value if isinstance(value, bytes) else struct.pack("<I", _TYPES[type(value)]) + payload(value)


def payload(value: Any) -> bytes:
    if isinstance(value, list):
        kind = _TYPES[type(value[0])] if value else 4
        return struct.pack("<IQ", kind, len(value)) + b"".join(map(payload, value))
    if isinstance(value, str):
        return text(value)
    return struct.pack({bool: "<?", int: "<I", float: "<f"}[type(value)], value)


def gguf_bytes(fields: dict[str, Any] | None = None, lies: dict[str, dict[str, Any]] | None = None) -> bytes:
    """Make a file that is right except for fields (None omits one) and claims on tensors: axes, type, offset, name."""
    given = {name: value for name, value in (GGUF_FIELDS | (fields or {})).items() if value is not None}
    head, data = b"", b""
    for name, value in tensors().items():
        name, value = gguf_name(name), np.ascontiguousarray(value, np.float32)
        said = {"name": name, "axes": value.shape[::-1], "type": 0, "offset": len(data)} | (lies or {}).get(name, {})
        head += text(said["name"]) + struct.pack(f"<I{len(said['axes'])}Q", len(said["axes"]), *said["axes"])
        head += struct.pack("<IQ", said["type"], said["offset"])
        data += value.tobytes() + bytes(-value.nbytes % 32)
    metadata = b"".join(text(name) + typed(value) for name, value in given.items())
    start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors()), len(given)) + metadata + head
    return start + bytes(-len(start) % 32) + data


def gguf_cases() -> list[Case]:
    """Break claims of the header, place tensors elsewhere, and end files early."""
    field = lambda kind, rest: b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<I", kind) + rest
    array = lambda kind, count, rest=b"": field(9, struct.pack("<IQ", kind, count) + rest)
    nested = lambda depth: array(9, 1, struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 0, 1) + b"1")
    headers = {
        **{f"an array of 2**60, type {kind}": array(kind, 2**60) for kind in range(13)},
        **{f"an array of 10**10, type {kind}": array(kind, 10**10, bytes(64)) for kind in range(13)},
        "an unknown type": field(99, bytes(8)),
        "a long text": field(8, struct.pack("<Q", 2**63)),
        "a name of 2**64": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**64 - 1),
        "2**63 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(999),
        "2**60 fields": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(999),
        "1,000,000 fields": b"GGUF" + struct.pack("<IQQ", 3, 0, 10**6) + bytes(13 * 10**6),
        "arrays 6 deep": nested(5),
        "arrays 10,000 deep": nested(10_000),
        "the other byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        "no magic": b"GGML" + bytes(99),
        "nothing": b"",
        "a name that is no UTF-8": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"\xff") + typed(1),
    }
    whole, vocabulary = gguf_bytes(), "token_embd.weight"
    lies = {
        "no axes": {"axes": ()},
        "one axis": {"axes": (SIZES.vocab_size * SIZES.hidden_size,)},
        "five axes": {"axes": (64, 256, 1, 1, 1)},
        "an axis of 0": {"axes": (64, 0)},
        "an axis of 2**63": {"axes": (64, 2**63)},
        "axes that wrap around": {"axes": (2**33, 2**33)},
        "an unknown type": {"type": 999},
        "a removed type": {"type": 4},
        "an offset of 2**64 - 32": {"offset": 2**64 - 32},
        "an offset past the end": {"offset": len(whole) // 32 * 32},
        "an offset off the alignment": {"offset": 4},
        "the name of another": {"name": "output_norm.weight"},
        "a name of 100 KB": {"name": "\x1b" * 100_000},
        "a long name": {"name": "n" * 10**6},
        "Hugging Face's name": {"name": "model.norm.weight"},
    }
    return [
        Case("GGUF right", with_gguf(whole), True),
        *(Case(f"GGUF with {name}", with_gguf(contents)) for name, contents in headers.items()),
        *(Case(f"tensor with {name}", with_gguf(gguf_bytes(lies={vocabulary: lie}))) for name, lie in lies.items()),
        Case("more tokens than rows", with_gguf(gguf_bytes(_vocabulary([str(i) for i in range(300)])))),
        Case("runs of a letter up to 200", with_gguf(gguf_bytes(_vocabulary(["a" * (i + 1) for i in range(200)])))),
        Case("a token of 2,000 letters", with_gguf(gguf_bytes(_vocabulary(["a" * 2000, "b", "c"])))),
        Case("a tensor of blocks", with_gguf(gguf_bytes(lies={vocabulary: {"type": 2}})), True),
        Case("a tensor over another", with_gguf(gguf_bytes(lies={"output_norm.weight": {"offset": 0}}))),
        Case("a vector of blocks", with_gguf(gguf_bytes(lies={"output_norm.weight": {"type": 8}}))),
        *(Case(f"GGUF's first {n} bytes", with_gguf(whole[:n])) for n in range(0, len(whole), len(whole) // 40)),
    ]


def _vocabulary(tokens: list[str]) -> dict[str, Any]:
    fields = {"tokens": tokens, "scores": [0.0] * len(tokens), "token_type": [1] * len(tokens)}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def gguf_field_cases() -> list[Case]:
    """Give each field of the metadata each kind of value."""
    values = {
        "text": "64",
        "float": 64.5,
        "list": [1, 2],
        "texts": ["a", "b"],
        "empty": struct.pack("<IIQ", 9, 4, 0),
        "nested": struct.pack("<IIQIQI", 9, 9, 1, 4, 1, 7),
        "nan": float("nan"),
        "inf": float("inf"),
        "negative": struct.pack("<Ii", 5, -64),
        "zero": 0,
        "most": 2**32 - 1,
        "huge": struct.pack("<IQ", 10, 2**64 - 1),
        "true": True,
        "missing": None,
        "long text": "\x1b\n" * 100_000,
    }
    optional = ("layer_norm_rms_epsilon", "freq_base", "dimension_count", "eos_token_id")
    may_be = {"freq_base": ("float", "most", "huge"), "bos_token_id": ("zero",), "eos_token_id": ("zero",)}
    linear = {"llama.rope.scaling.type": "linear"}
    cases = []
    for name in [*GGUF_FIELDS, *_MORE_GGUF_FIELDS]:
        last = name.rsplit(".", 1)[-1]
        for kind, value in values.items():
            is_right = kind in may_be.get(last, ()) or (kind == "missing" and last in (*optional, *_MORE_RIGHT))
            is_right |= (last, kind) in _MORE_RIGHT_KINDS
            fields = {name: value} | (linear if last == "factor" else {})
            cases.append(Case(f"{name}={kind}", with_gguf(gguf_bytes(fields)), is_right))
    return cases


_MORE_GGUF_FIELDS = (
    "general.alignment",
    "llama.attention.key_length",
    "llama.attention.sliding_window",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.expert_count",
    "tokenizer.chat_template",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.unknown_token_id",
)
_MORE_RIGHT = tuple(name.rsplit(".", 1)[-1] for name in _MORE_GGUF_FIELDS if not name.endswith("factor"))
_MORE_RIGHT_KINDS = {
    ("sliding_window", "zero"),
    ("expert_count", "zero"),
    ("factor", "float"),
    ("chat_template", "text"),
    ("chat_template", "long text"),
    ("add_bos_token", "true"),
    ("unknown_token_id", "zero"),
}


def with_gguf(contents: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "model.gguf").write_bytes(contents)
        return folder / "model.gguf"

    return write
