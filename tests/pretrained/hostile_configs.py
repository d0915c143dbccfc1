"""Wrong contents of a ``config.json``, and what may take the place of a file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_models import CONFIG, ELSEWHERE, SINGLE, Case, folder_with

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
    "num_key_value_heads": ("null",),  # null means 4 heads: refused, as the tensors have 2
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
    """Give a field each kind of value."""
    return [
        Case(f"{field}={kind}", with_config({**CONFIG, field: value}), kind in _RIGHT.get(field, ()))
        for kind, value in VALUES.items()
    ]


def scaling_cases() -> list[Case]:
    """Give each field of ``rope_scaling`` each kind of value, and combine fields that do not go together."""
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
    """Break ``config.json`` as a file, and combine sizes that do not go together."""
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
        *(Case(f"config.json {name}", with_config(value)) for name, value in files.items()),
        *(Case(f"sizes {name}", with_config(CONFIG | change)) for name, change in together.items()),
        *(
            Case(f"{file} is {kind}", _put_in_place(file, put))
            for file in ("config.json", SINGLE, "tokenizer.json", "vocab.json")
            for kind, put in PLACED.items()
        ),
    ]


def with_config(config: Any) -> Callable[[Path], Path]:
    return lambda folder: folder_with(folder, config)


def _with_scaling(scaling: Any) -> Callable[[Path], Path]:
    return with_config(CONFIG | {"rope_scaling": scaling})


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
"""What may take the place of a file."""


def _put_in_place(name: str, put: Callable[[Path], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder_with(folder)
        (folder / name).unlink(missing_ok=True)
        put(folder / name)
        return folder

    return write
