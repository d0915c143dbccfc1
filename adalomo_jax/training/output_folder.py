"""The folder that a run writes: which folder it may be, how one run at a time owns it, and how it is told from text."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from adalomo_jax.inputs import InputError
from adalomo_jax.run_files import LOCK, METRICS, RUN_FILES, WEIGHTS
from adalomo_jax.training.config import FinetuneConfig


def output_folder(config: FinetuneConfig) -> Path:
    """The folder of this run, checked but not created.

    Raises:
        InputError: it cannot be a folder, or it holds files that are not this run's.
    """
    folder = config.output
    if folder is None:
        folder = Path("runs") / f"{Path(config.model).stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = local_path(folder, "--output")
    check_folder(folder)
    check_held(folder, resume=config.resume)
    return folder


def check_held(folder: Path, *, resume: bool) -> None:
    """Raise InputError if the folder of a new run holds a run, or that of a resumed run holds other weights."""
    held = [name for name in RUN_FILES if (folder / name).exists()]
    if held and not resume:
        raise InputError(
            f"--output {folder} holds a run already ({', '.join(held)}); name another folder, or go on with --resume"
        )
    weights = next((path.name for path in sorted(folder.glob("*")) if path.suffix in WEIGHTS), None)
    checkpoints = (folder / "checkpoints").is_dir()
    if resume and weights is not None and not (folder / METRICS).exists() and not checkpoints:
        raise InputError(
            f"--resume: {folder} is no folder of a run, it holds {weights} and no {METRICS}; name another --output"
        )


def local_path(path: Path, option: str) -> Path:
    """A path on this machine's disks, with a leading ``~`` as the home folder.

    Raises:
        InputError: it is a storage bucket's address, or its name is no text.

    >>> local_path(Path("runs/a"), "--output")
    PosixPath('runs/a')
    """
    if match := re.match(r"([a-z][a-z0-9]+):/", str(path)):
        raise InputError(
            f"{option} {path} is an address of {match[1]}:// storage, which is not written to: name a folder on this "
            "machine, and copy it afterwards"
        )
    try:
        str(path).encode()
        return path.expanduser()
    except UnicodeEncodeError:
        name = str(path).encode(errors="backslashreplace").decode()
        raise InputError(f"{option} {name} has bytes in its name that are not UTF-8: name another one") from None
    except RuntimeError as error:  # ~somebody, who does not exist
        raise InputError(f"{option} {path}: {' '.join(str(error).split())}") from None


def check_folder(folder: Path) -> None:
    """Raise InputError for an ``--output`` that cannot be a folder; it need not exist."""
    try:
        if os.path.lexists(folder) and not folder.exists():
            raise InputError(f"--output {folder} is a broken link")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--output {folder} is a file, not a folder")
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:  # a name that is too long, links in a circle
        raise InputError(f"--output {folder} cannot be created: {error.strerror}") from None
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--output {folder} cannot be created: {existing} is no folder that may be written to")
    for name in RUN_FILES:
        path = folder / name
        if os.path.lexists(path) and path.is_dir() != (name == "checkpoints"):
            due = "a folder" if name == "checkpoints" else "a file"
            raise InputError(f"--output {folder} holds {name}, which a run has as {due}: move it away")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it. If it stays empty, it is removed again.

    Raises:
        InputError: it cannot be made, or another run is writing there.
    """
    absolute = folder.absolute()
    made = [path for path in (absolute, *absolute.parents) if not path.exists()]
    try:
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(folder))
            except OSError as error:
                raise InputError(f"--output {folder} cannot be written to: {error.strerror}") from None
            yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # not empty, as after most runs
                path.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            number = file.read().strip()
            raise InputError(
                f"--output {folder}: another run is writing there{number and f', as process {number}'}; wait for its "
                "end, or name another folder"
            ) from None
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise InputError(f"--output {folder}: another run has just ended there; give the same command again")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is locked: a run that opened it before is told so above


def check_picture(path: Path) -> None:
    """Raise InputError for an ``--output`` that cannot be a file; an existing one is replaced."""
    if path.is_dir():
        raise InputError(f"--output {path} is a folder, not a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"--output {path} cannot be written: {path.parent} is no folder that may be written to")
