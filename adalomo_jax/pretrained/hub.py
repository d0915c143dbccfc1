"""Names on Hugging Face's hub, and checkpoints by their names, fetched once into its cache.

Its own library does the work: cache, tokens, offline mode, resumption, progress. Fetched are weights as safetensors,
JSON, and the tokenizer's files: no code, and nothing that is unpickled.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adalomo_jax.models.fields import plain
from adalomo_jax.pretrained.export import KEPT_FILES
from adalomo_jax.pretrained.json_files import read_json
from adalomo_jax.pretrained.source import INDEX, SINGLE

_SIZES = "config.json"
_WEIGHTS = (SINGLE, INDEX, "model-*-of-*.safetensors")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)
_SPARE = 2**30
"""Bytes that must stay free on the disk."""


class Download(NamedTuple):
    """What is about to be fetched. It prints in one line."""

    name: str
    missing_bytes: int
    """Bytes of the files that the cache lacks."""
    total_bytes: int
    folder: Path
    """The cache."""
    config: Mapping[str, Any] = {}
    """The contents of ``config.json``, of a model."""

    def __str__(self) -> str:
        part = "" if self.missing_bytes == self.total_bytes else f" of {self.total_bytes / 1e9:.2f}"
        return f"fetching {self.name}: {self.missing_bytes / 1e9:.2f}{part} GB, into {self.folder}"


def is_hub_name(name: str) -> bool:
    """Whether a name is of the form ``owner/name``, or ``owner/name@revision``, and no such path exists here.

    >>> is_hub_name("Qwen/Qwen3-0.6B"), is_hub_name("Qwen/Qwen3-0.6B@main"), is_hub_name("./a/b"), is_hub_name("tiny")
    (True, True, False, False)
    """
    return bool(_NAME.fullmatch(name)) and not os.path.lexists(name)


def repository_and_revision(name: str) -> tuple[str, str | None]:
    """The parts of a name.

    >>> repository_and_revision("Qwen/Qwen3-0.6B@main"), repository_and_revision("Qwen/Qwen3-0.6B")
    (('Qwen/Qwen3-0.6B', 'main'), ('Qwen/Qwen3-0.6B', None))
    """
    repository, _, revision = name.partition("@")
    return repository, revision or None


def fetch_model(name: str, before: Callable[[Download], object] | None = None) -> Path:
    """The folder of a model on the hub, in Hugging Face's cache, with the files that it lacks fetched.

    A fetch that was cut off goes on where it stopped. Without a network, or with ``HF_HUB_OFFLINE=1``, the folder is
    the one that was fetched before. ``HF_TOKEN`` or ``hf auth login`` opens gated models.

    Args:
        name: ``owner/model`` or ``owner/model@revision``.
        before: is called before weights are fetched, if any are missing; it may raise.

    Raises:
        ValueError: there is no such model or revision, it is gated, the hub cannot be reached and the cache does not
            have it, it has no weights as safetensors, or the disk has too little room. One line, with the way out.
    """
    from huggingface_hub import constants  # it takes a while, and most runs do without it
    from huggingface_hub.errors import DryRunError

    everything = [_SIZES, *_WEIGHTS, *KEPT_FILES]
    if constants.HF_HUB_OFFLINE:
        return Path(_snapshot(name, everything, local_files_only=True))
    try:
        folder = _snapshot(name, [_SIZES, *KEPT_FILES], tqdm_class=_no_bar())
        files: Any = _snapshot(name, everything, tqdm_class=_no_bar(), dry_run=True)
    except DryRunError:  # the hub cannot be reached
        return Path(_snapshot(name, everything, local_files_only=True))
    _check(name, Path(folder), files, before)
    return Path(_snapshot(name, everything))


def fetch_sizes(name: str) -> Mapping[str, Any]:
    """The contents of ``config.json`` of a model on the hub. Nothing else is fetched.

    Raises:
        ValueError: as `fetch_model` does.
    """
    from huggingface_hub import constants

    folder = Path(_snapshot(name, [_SIZES], local_files_only=constants.HF_HUB_OFFLINE, tqdm_class=_no_bar()))
    if not (folder / _SIZES).exists():
        raise ValueError(f"{name} has no {_SIZES}: it is no model of transformers")
    return read_json(folder / _SIZES)


def check_data_set(
    name: str, files: Sequence[str], written_bytes: int | None, before: Callable[[Download], object] | None = None
) -> None:
    """Raises ValueError if the disk has no room for a data set on the hub. Fetches nothing.

    Args:
        name: ``owner/data`` or ``owner/data@revision``.
        files: the paths of its files there.
        written_bytes: what `datasets` will make of them, beside them; None for as much again.
        before: is called if files are missing; it may raise.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import DryRunError

    if constants.HF_HUB_OFFLINE or not files:
        return
    try:
        found: Any = _snapshot(name, list(files), repo_type="dataset", tqdm_class=_no_bar(), dry_run=True)
    except DryRunError:  # the hub cannot be reached
        return
    download = _download(name, found)
    if download.missing_bytes:
        _check_room(download, download.missing_bytes if written_bytes is None else written_bytes)
        if before is not None:
            before(download)


def _snapshot(name: str, patterns: list[str], **options: Any) -> Any:
    """``snapshot_download`` of these files, whose errors are one line."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    repository, revision = repository_and_revision(name)
    try:
        return snapshot_download(repository, revision=revision, allow_patterns=patterns, **options)
    except DryRunError:
        raise
    except Exception as error:
        raise ValueError(_reason(name, error)) from None


def _no_bar() -> type:
    """A progress bar that is not shown."""
    from tqdm import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **(options | {"disable": True}))

    return NoBar


def _check(name: str, folder: Path, files: list[Any], before: Callable[[Download], object] | None) -> None:
    """Refuses what cannot be used, or has no room, before its weights are fetched."""
    names = {file.filename for file in files}
    if _SIZES not in names:
        raise ValueError(f"{name} has no {_SIZES}: it is no model of transformers")
    if not any(file.endswith(".safetensors") for file in names):
        raise ValueError(f"{name} has no weights as safetensors; other formats are not read")
    download = _download(name, files)
    _check_room(download)
    if download.missing_bytes and before is not None:
        before(download._replace(config=read_json(folder / _SIZES)))


def _download(name: str, files: list[Any]) -> Download:
    """What these files of a dry run mean."""
    from huggingface_hub import constants

    missing = sum(file.file_size or 0 for file in files if file.will_download)
    return Download(name, missing, sum(file.file_size or 0 for file in files), Path(constants.HF_HUB_CACHE))


def _check_room(download: Download, beside: int = 0) -> None:
    """Raises ValueError if the disk has no room for what is missing, and for as many bytes beside it."""
    needed, cache = download.missing_bytes + beside, download.folder
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed + _SPARE > free:
        raise ValueError(
            f"{download.name} takes {needed / 1e9:.2f} GB, and {cache} has {free / 1e9:.2f} GB free: make room, or "
            "name another folder in HF_HUB_CACHE"
        )


def _reason(name: str, error: Exception) -> str:
    """What an error of the hub's library means, and the way out, on one line."""
    from huggingface_hub import constants, errors

    repository, revision = repository_and_revision(name)
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repository}"
        return f"{name} is gated: accept its terms at {page}, then give your token by `hf auth login` or HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no file or folder {name}, and no model of that name on {constants.ENDPOINT}; a private one "
            "needs your token by `hf auth login` or HF_TOKEN"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | FileNotFoundError):
        why = "HF_HUB_OFFLINE forbids to ask" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        cache = f"Hugging Face's cache {constants.HF_HUB_CACHE} does not have all of it"
        return f"there is no file or folder {name}; if it is a model on the hub: {why}, and {cache}"
    return f"{name} could not be fetched ({plain(error, 200)}): give the same command again, and it goes on"
