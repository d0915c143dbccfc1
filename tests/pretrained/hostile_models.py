"""Models that are broken or made to do harm, and a reader with capped memory and time."""

import contextlib
import dataclasses
import functools
import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save
from small_models import LLAMA, random_params, tensors_in

from adalomo_jax.models import to_hugging_face
from adalomo_jax.pretrained.by_name import find_model
from adalomo_jax.pretrained.load import load_params


class Case(NamedTuple):
    """A model that someone hands over."""

    name: str
    write: Callable[[Path], Path]
    """Writes the model into an existing folder and returns the path to open."""
    is_right: bool | None = False
    """Whether the model can be read after all; None if either is allowed."""


SIZES = dataclasses.replace(LLAMA, num_hidden_layers=2, vocab_size=256)
CONFIG = to_hugging_face(SIZES, "float32") | {"tokens": "bytes: token i is the byte i of UTF-8 text"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ELSEWHERE = Path(__file__)
"""A file that no model may open."""


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    return tensors_in(random_params(SIZES), SIZES)


@functools.cache
def weights() -> bytes:
    return save(tensors())


def folder_with(folder: Path, config: Any = CONFIG, weight_bytes: bytes | None = None) -> Path:
    """Write a model that is right except for the arguments."""
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "config.json").write_bytes(text)
    (folder / SINGLE).write_bytes(weights() if weight_bytes is None else weight_bytes)
    return folder


def outcome(case: Case, folder: Path, *, loads: bool, seconds: int = 10, gigabytes: float = 2.0) -> str | None:
    """Read a model, and return the message that refuses it, or None if it is read.

    Any error except a ``ValueError`` goes through: a traceback, MemoryError over the cap, TookTooLong.
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
    """This is not a TimeoutError: that is an OSError, which readers of files catch."""


@contextlib.contextmanager
def capped(seconds: int, gigabytes: float) -> Iterator[None]:
    """End a block that takes longer, or that takes this much more memory than is in use."""

    def stop(*_: object) -> None:
        raise TookTooLong(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (int(in_use + gigabytes * 2**30), hard))
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)  # repeats: callbacks of garbage collection swallow errors
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
