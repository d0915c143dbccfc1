"""A model by its name: its sizes, its tokenizer, and the weights that it starts from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from adalomo_jax.models import PRESETS, DecoderConfig, to_hugging_face
from adalomo_jax.pretrained.checkpoint import PACKAGED, Checkpoint, open_checkpoint
from adalomo_jax.pretrained.export import check_kept_files, copy_files, export_config
from adalomo_jax.pretrained.gguf_tokenizer import tokenizer_of_gguf
from adalomo_jax.pretrained.hub import Download, fetch_model, is_hub_name, repository_and_revision
from adalomo_jax.pretrained.json_files import read_json
from adalomo_jax.pretrained.load import check_tensors
from adalomo_jax.pretrained.tokenizer import ByteTokenizer, TextTokenizer
from adalomo_jax.pretrained.tokenizer_files import read_tokenizer


class Pretrained(NamedTuple):
    """A model to train or to run."""

    name: str
    config: DecoderConfig
    tokenizer: ByteTokenizer | TextTokenizer
    checkpoint: Checkpoint | None
    """Its weights; None for a preset, whose weights are drawn at random."""


_BYTES = {"tokens": "bytes: token i is the byte i of UTF-8 text"}
"""The entry that `export_rest` adds to the ``config.json`` of a model that reads bytes."""


def find_model(name: str, before_fetch: Callable[[Download], object] | None = None) -> Pretrained:
    """A preset, which reads bytes; or a checkpoint that `open_checkpoint` finds, with its own tokenizer.

    A checkpoint on the hub is fetched first, with ``before_fetch`` as in `fetch_model`.

    Raises:
        ValueError: it is neither, or cannot be fetched; the checkpoint is broken or lacks tensors; a file beside it
            cannot be copied (`check_kept_files`); or its tokenizer has more tokens than the model.
    """
    if name in PRESETS:
        return Pretrained(name, PRESETS[name], ByteTokenizer(), None)
    on_hub = is_hub_name(name)
    checkpoint = open_checkpoint(fetch_model(name, before_fetch) if on_hub else name)
    if checkpoint.hugging_face is not None:
        check_kept_files(checkpoint.path)
    check_tensors(checkpoint.config, checkpoint.source)
    tokenizer = _tokenizer(checkpoint)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {name} has {tokenizer.vocab_size} tokens, more than the {checkpoint.config.vocab_size} "
            "of its embedding: they belong to different models"
        )
    label = checkpoint.path.stem if checkpoint.path.is_file() else checkpoint.path.name
    label = name if name in PACKAGED else repository_and_revision(name)[0].rpartition("/")[2] if on_hub else label
    return Pretrained(label, checkpoint.config, tokenizer, checkpoint)


def export_rest(folder: Path, model: Pretrained, dtype: str) -> None:
    """Write the rest of a folder with weights: sizes, tokenizer, chat template; see `export_params`."""
    checkpoint = model.checkpoint
    like: dict[str, Any] | None = None
    if checkpoint is None:
        like = to_hugging_face(model.config, dtype) | _BYTES
    elif checkpoint.hugging_face is not None:
        like = checkpoint.hugging_face
        copy_files(checkpoint.path, folder)
    elif isinstance(model.tokenizer, TextTokenizer):
        model.tokenizer.save(folder)
        like = to_hugging_face(model.config, dtype)
        like |= {"bos_token_id": model.tokenizer.bos, "eos_token_id": model.tokenizer.eos}
    export_config(folder, model.config, dtype, like)


def find_tokenizer(folder: Path) -> ByteTokenizer | TextTokenizer:
    """The tokenizer of a folder in Hugging Face's format; that of bytes if `export_rest` wrote it for a preset.

    Raises:
        ValueError: it has no ``config.json``, or no tokenizer that can be read.
    """
    if read_json(folder / "config.json").get("tokens") == _BYTES["tokens"]:
        return ByteTokenizer()
    return read_tokenizer(folder)


def _tokenizer(checkpoint: Checkpoint) -> ByteTokenizer | TextTokenizer:
    return tokenizer_of_gguf(checkpoint.path) if checkpoint.hugging_face is None else find_tokenizer(checkpoint.path)
