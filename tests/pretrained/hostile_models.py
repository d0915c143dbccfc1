"""Models that are broken or made to do harm, by kind; and a reader of theirs that is capped in memory and time."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save
from small_models import LLAMA, gguf_name, random_params, tensors_in

from adalomo_jax.models import to_hugging_face
from adalomo_jax.pretrained.load import load_params
from adalomo_jax.pretrained.model import find_model


class Case(NamedTuple):
    """A model that someone hands over."""

    name: str
    write: Callable[[Path], Path]
    """Into a folder that is there, of which it returns what to open."""
    is_right: bool | None = False
    """Whether it can be read after all; None where either may be."""


SIZES = dataclasses.replace(LLAMA, num_hidden_layers=2, vocab_size=256)
CONFIG = to_hugging_face(SIZES, "float32") | {"tokens": "bytes: token i is the byte i of UTF-8 text"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ELSEWHERE = Path(__file__)
"""A file that no model is to open."""


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    return tensors_in(random_params(SIZES), SIZES)


@functools.cache
def weights() -> bytes:
    return save(tensors())


def folder_with(folder: Path, config: Any = CONFIG, weight_bytes: bytes | None = None) -> Path:
    """A model that is right but for what is given."""
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "config.json").write_bytes(text)
    (folder / SINGLE).write_bytes(weights() if weight_bytes is None else weight_bytes)
    return folder


# What config.json says.

VALUES = {
    "text": "64",
    "float": 64.5,
    "list": [64],
    "object": {"a": 1},
    "null": None,
    "nan": float("nan"),
    "inf": float("inf"),
    "negative": -64,
    "zero": 0,
    "huge": 10**12,
    "endless": 10**400,
    "true": True,
    "long text": "\x1b[31m\n" * 10_000,
}
_SIZE_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OPTIONAL = {
    "num_key_value_heads": ("null",),  # 4 heads for 2: refused by the tensors, which have 2
    "head_dim": ("null",),
    "rope_theta": ("null", "float", "huge"),
    "rms_norm_eps": ("null",),
    "tie_word_embeddings": ("null", "true"),
    "attention_bias": ("null",),
    "mlp_bias": ("null",),
    "hidden_act": ("null",),
    "sliding_window": ("null",),
    "use_sliding_window": ("null", "true"),
    "rope_scaling": ("null", "object"),
    "rope_parameters": ("null", "object"),
}
_RIGHT = {name: kinds for name, kinds in _OPTIONAL.items() if name != "num_key_value_heads"}
FIELDS = (*_SIZE_FIELDS, "max_position_embeddings", "model_type", *_OPTIONAL)
_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_SCALING |= {"original_max_position_embeddings": 8192}


def config_cases(field: str) -> list[Case]:
    """Each kind of value of a field."""
    return [
        Case(f"{field}={kind}", _with_config({**CONFIG, field: value}), kind in _RIGHT.get(field, ()))
        for kind, value in VALUES.items()
    ]


def scaling_cases() -> list[Case]:
    """Each kind of value of each field of ``rope_scaling``, and fields that do not go together."""
    right = {
        "factor": ("float",),
        "low_freq_factor": (),
        "high_freq_factor": ("float",),
        "original_max_position_embeddings": (),
    }
    cases = [
        Case(f"rope_scaling.{field}={kind}", _with_scaling(_SCALING | {field: value}), kind in right.get(field, ()))
        for field in _SCALING
        for kind, value in VALUES.items()
    ]
    others: dict[str, Any] = {
        "equal": _SCALING | {"low_freq_factor": 4.0},
        "swapped": _SCALING | {"low_freq_factor": 4.0, "high_freq_factor": 1.0},
        "no factor": {"type": "linear"},
        "another": {"type": "yarn", "factor": 2.0},
        "base": {"rope_type": "default", "rope_theta": 0.5},
    }
    return [*cases, *(Case(f"rope_scaling {name}", _with_scaling(value)) for name, value in others.items())]


def config_file_cases() -> list[Case]:
    """What ``config.json`` is as a file, and sizes that do not go together."""
    text = json.dumps(CONFIG).encode()
    files = {
        "empty": b"",
        "deep": b"[" * 200_000,
        "deep object": b'{"a":' * 100_000,
        "list": b"[1]",
        "no UTF-8": b'{"\xff": 1}',
        "BOM": b"\xef\xbb\xbf" + text,
        "many digits": b'{"vocab_size": ' + b"9" * 10_000 + b"}",
        "NULs": bytes(1000),
        **{f"first {n} bytes": text[:n] for n in range(1, len(text), 37)},
    }
    together = {
        "heads": {"num_attention_heads": 3},
        "more key heads": {"num_key_value_heads": 8},
        "odd heads": {"head_dim": 15},
        "no width": {"head_dim": None, "num_attention_heads": 512, "num_key_value_heads": 1},
        "many layers": {"num_hidden_layers": 9_999},
        "all large": {"hidden_size": 1_000_000, "vocab_size": 10**8, "num_hidden_layers": 10, "head_dim": 10_000},
    }
    return [
        *(Case(f"config.json {name}", _with_config(value)) for name, value in files.items()),
        *(Case(f"sizes {name}", _with_config(CONFIG | change)) for name, change in together.items()),
        *(
            Case(f"{file} is {kind}", _put_in_place(file, put))
            for file in ("config.json", SINGLE, "tokenizer.json", "vocab.json")
            for kind, put in PLACED.items()
        ),
    ]


def _with_config(config: Any) -> Callable[[Path], Path]:
    return lambda folder: folder_with(folder, config)


def _with_scaling(scaling: Any) -> Callable[[Path], Path]:
    return _with_config(CONFIG | {"rope_scaling": scaling})


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(15 * 10**8)


PLACED: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link elsewhere": lambda path: path.symlink_to(ELSEWHERE),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "1.5 GB": _sparse,
}
"""What may lie where a file is due."""


def _put_in_place(name: str, put: Callable[[Path], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder_with(folder)
        (folder / name).unlink(missing_ok=True)
        put(folder / name)
        return folder

    return write


# What the index and the weights say.


def index_cases() -> list[Case]:
    """Of a folder with two files and an index, which is right but for what is given."""
    first = next(iter(tensors()))
    names = ["", ".", "..", "a/b", "../secret", "/etc/passwd", "a\\b", "a\0b", "a\nb", "x" * 300, "x" * 10**6]
    names += [5, None, True, ["a.safetensors"], {"a": 1}, 1.5, "missing.safetensors", "\ud800", "b.safetensors", "."]
    indices: dict[str, Any] = {
        "no map": {},
        "a list": [],
        "a map that is a list": {"weight_map": ["a"]},
        "a map that is null": {"weight_map": None},
        "an empty map": {"weight_map": {}},
        "deep": b'{"weight_map":' * 100_000,
        "half": json.dumps({"weight_map": _places()}).encode()[:-30],
        "an unknown tensor": {"weight_map": _places() | {"y" * 10**6: "a.safetensors"}},
        "a lost tensor": {"weight_map": {name: at for name, at in _places().items() if name != first}},
        "many lost files": {"weight_map": {f"t{i}": f"f{i}.safetensors" for i in range(20_000)}},
    }
    links = {f"a file that is {kind}": put for kind, put in PLACED.items()}
    return [
        Case("index right", _with_index({"weight_map": _places()}), True),
        *(Case(f"index to {name!r:.30}", _with_index({"weight_map": _places() | {first: name}})) for name in names),
        *(Case(f"index {name}", _with_index(value)) for name, value in indices.items()),
        *(Case(f"index to {name}", _with_index({"weight_map": _places()}, put)) for name, put in links.items()),
    ]


def _places() -> dict[str, str]:
    return {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(tensors())}


def _with_index(index: Any, put: Callable[[Path], object] | None = None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder_with(folder)
        (folder / SINGLE).unlink()
        for file in ("a.safetensors", "b.safetensors"):
            held = {name: tensors()[name] for name, at in _places().items() if at == file}
            (folder / file).write_bytes(save(held))
        (folder / INDEX).write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
        if put is not None:
            (folder / "b.safetensors").unlink()
            put(folder / "b.safetensors")
        return folder

    return write


def safetensors_cases() -> list[Case]:
    """Headers that lie, files that end, and values that are no numbers."""
    whole = weights()
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    first = next(iter(tensors()))
    at = header[first]["data_offsets"]
    changes: dict[str, Any] = {
        "offsets past the end": {first: header[first] | {"data_offsets": [at[0], at[1] + 10**9]}},
        "offsets of 2**64": {first: header[first] | {"data_offsets": [2**64 - 8, 2**64]}},
        "negative offsets": {first: header[first] | {"data_offsets": [-8, at[1]]}},
        "offsets turned": {first: header[first] | {"data_offsets": at[::-1]}},
        "a larger shape": {first: header[first] | {"shape": [10**9, 10**9]}},
        "a shape of 100,000 axes": {first: header[first] | {"shape": [1] * 100_000 + header[first]["shape"]}},
        "another type": {first: header[first] | {"dtype": "I32"}},
        "an unknown type": {first: header[first] | {"dtype": "F1"}},
        "no type": {first: {"shape": [1], "data_offsets": at}},
        "a list": {first: [1]},
        "a name of 1 MB": {"z" * 10**6: header[first], first: None},
        "a name that obeys": {"\x1b[2J\nx": header[first], first: None},
        "the shape of a vector": {first: header[first] | {"shape": [int(np.prod(header[first]["shape"]))]}},
    }
    claims = (0, 1, length - 1, length + 1, len(whole), 2**31, 2**62, 2**64 - 1)
    return [
        *(Case(f"weights with {name}", _with_header(header | change, data)) for name, change in changes.items()),
        *(Case(f"a header of {n} bytes", _with_weights(struct.pack("<Q", n) + whole[8:])) for n in claims),
        *(Case(f"the first {n} bytes", _with_weights(whole[:n])) for n in range(0, len(whole), len(whole) // 40)),
        *(
            Case(f"weights {name}", _with_weights(b))
            for name, b in {"GGUF": b"GGUF" * 99, "a pickle": b"\x80\x04."}.items()
        ),
        Case("a header that is deep", _with_weights(struct.pack("<Q", 100_000) + b"[" * 100_000)),
    ]


def finite_cases() -> list[Case]:
    """One value in one tensor."""
    return [
        Case(f"{value} in {name}", _with_value(name, value))
        for name in tensors()
        for value in (float("nan"), float("inf"), -float("inf"))
    ]


def _with_weights(weight_bytes: bytes) -> Callable[[Path], Path]:
    return lambda folder: folder_with(folder, weight_bytes=weight_bytes)


def _with_header(header: dict[str, Any], data: bytes) -> Callable[[Path], Path]:
    text = json.dumps({name: value for name, value in header.items() if value is not None}).encode()
    return _with_weights(struct.pack("<Q", len(text)) + text + data)


def _with_value(name: str, value: float) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        changed = tensors()[name].copy()
        changed.flat[changed.size // 2] = value
        return folder_with(folder, weight_bytes=save(tensors() | {name: changed}))

    return write


def flipped_cases(count: int) -> list[Case]:
    """A few bytes of a file changed at random: it is read, or refused in one line."""
    cases = []
    for seed in range(count):
        for name, whole, write in (
            ("config.json", json.dumps(CONFIG).encode(), _with_config),
            ("safetensors", weights(), _with_weights),
            ("GGUF", gguf_bytes(), _with_gguf),
        ):
            cases.append(Case(f"{name} flipped {seed}", write(flipped(whole, seed)), None))
    return cases


def flipped(whole: bytes, seed: int) -> bytes:
    """Bytes near the start, where the claims are, are others."""
    at, changed = random.Random(seed), bytearray(whole)
    for _ in range(at.choice([1, 1, 2, 8])):
        changed[at.randrange(min(len(changed), 3000))] = at.choice([0, 1, 0x7F, 0x80, 0xFF, at.randrange(256)])
    return bytes(changed)


# GGUF files.

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
    """A value with its type before it; bytes are that already."""
    return value if isinstance(value, bytes) else struct.pack("<I", _TYPES[type(value)]) + payload(value)


def payload(value: Any) -> bytes:
    if isinstance(value, list):
        kind = _TYPES[type(value[0])] if value else 4
        return struct.pack("<IQ", kind, len(value)) + b"".join(map(payload, value))
    if isinstance(value, str):
        return text(value)
    return struct.pack({bool: "<?", int: "<I", float: "<f"}[type(value)], value)


def gguf_bytes(fields: dict[str, Any] | None = None, lies: dict[str, dict[str, Any]] | None = None) -> bytes:
    """A file that is right but for fields, None to leave out, and what is said of tensors: axes, type, offset, name."""
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
    """Claims of the header, tensors that lie elsewhere, and files that end."""
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
        Case("GGUF right", _with_gguf(whole), True),
        *(Case(f"GGUF with {name}", _with_gguf(contents)) for name, contents in headers.items()),
        *(Case(f"tensor with {name}", _with_gguf(gguf_bytes(lies={vocabulary: lie}))) for name, lie in lies.items()),
        Case("a tensor of blocks", _with_gguf(gguf_bytes(lies={vocabulary: {"type": 2}})), True),
        Case("a tensor over another", _with_gguf(gguf_bytes(lies={"output_norm.weight": {"offset": 0}}))),
        Case("a vector of blocks", _with_gguf(gguf_bytes(lies={"output_norm.weight": {"type": 8}}))),
        *(Case(f"GGUF's first {n} bytes", _with_gguf(whole[:n])) for n in range(0, len(whole), len(whole) // 40)),
    ]


def gguf_field_cases() -> list[Case]:
    """Each kind of value of each field of the metadata."""
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
            cases.append(Case(f"{name}={kind}", _with_gguf(gguf_bytes(fields)), is_right))
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


def _with_gguf(contents: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "model.gguf").write_bytes(contents)
        return folder / "model.gguf"

    return write


# Reading them.


def outcome(case: Case, folder: Path, *, loads: bool, seconds: int = 10, gigabytes: float = 2.0) -> str | None:
    """What is said of a model that is refused, by all that reads it; None of one that is read.

    Anything but a ``ValueError`` goes through: a traceback, MemoryError over the cap, TookTooLong.
    """
    folder.mkdir()
    path = case.write(folder)
    try:
        with capped(seconds, gigabytes):
            model = find_model(str(path))
            if loads and model.checkpoint is not None:
                load_params(model.config, model.checkpoint.source, "float32")
    except ValueError as error:
        return str(error).replace(str(path), "MODEL")
    return None


class TookTooLong(BaseException):
    """No TimeoutError: that is an OSError, which readers of files catch."""


@contextlib.contextmanager
def capped(seconds: int, gigabytes: float) -> Iterator[None]:
    """Ends what takes longer, or so much more memory than there is in use."""

    def stop(*_: object) -> None:
        raise TookTooLong(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (int(in_use + gigabytes * 2**30), hard))
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)  # again, for callbacks of garbage collection swallow errors
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
