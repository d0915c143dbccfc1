"""Checkpoints of a run: written by Orbax in the background, and read back into the devices' memory."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from adalomo_jax.inputs import InputError, one_line
from adalomo_jax.models import DecoderConfig
from adalomo_jax.models.config import config_of
from adalomo_jax.models.weights import kept
from adalomo_jax.pretrained.names import param_shapes
from adalomo_jax.training.checkpoints.fingerprints import checksums
from adalomo_jax.training.checkpoints.quiet import quiet
from adalomo_jax.training.checkpoints.record import Origin, Record, sealed, unsealed
from adalomo_jax.training.devices import is_first_process
from adalomo_jax.training.memory_use import release_freed_memory

FOLDER = "checkpoints"
"""The folder of a run's output that has its checkpoints, by step."""
_REMOVED = ".removed"
"""Checkpoints move here to be removed, in one rename each: a kill leaves none half removed under its own name."""


@dataclasses.dataclass(frozen=True)
class Saver:
    """Writes the checkpoints of a run. Made by `open_saver`."""

    manager: ocp.CheckpointManager
    origin: Origin

    def save(self, step: int, params: Any, state: Any, batches: Mapping[str, Any], eval_loss: float | None) -> None:
        """Start to write a checkpoint, once the one before is written. The arrays may be donated at once.

        On a GPU or a TPU their bytes are in the host's memory until they are on the disk. On a CPU Orbax reads the
        arrays where they are, and this waits until it has: a step that begins earlier would write into new memory.

        Raises:
            InputError: the checkpoint before could not be written.
        """
        items = {"params": _named(params), "state": _named(state)}
        sums = {name: checksums(arrays) for name, arrays in items.items()}
        loss = eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None
        record = Record(step, batches, loss, self.origin, sums)
        args = {name: ocp.args.PyTreeSave(arrays) for name, arrays in items.items()}
        with self._one_line():
            self._wait()
            self.manager.save(
                step,
                args=ocp.args.Composite(**args, record=ocp.args.JsonSave(sealed(record))),
                metrics=None if loss is None else {"eval_loss": loss},
                force=True,
            )
            if jax.default_backend() == "cpu":
                self._wait()
                release_freed_memory()

    def wait(self) -> None:
        """Wait until everything is written. Raises as `save` does."""
        with self._one_line():
            self._wait()

    def _wait(self) -> None:
        self.manager.wait_until_finished()
        if is_first_process():
            _empty_removed(Path(self.manager.directory))

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """Turns Orbax's error while it writes, in this thread or another one, into an error of one line."""
        try:
            yield
        except Exception as error:
            folder = Path(self.manager.directory)
            raise InputError(
                f"a checkpoint in {folder} could not be written: {_reason(error)}; {_there_are(steps_in(folder))}; "
                "mend that, and go on with --resume"
            ) from error


@contextlib.contextmanager
def open_saver(folder: Path, origin: Origin, *, keep: int) -> Iterator[Saver]:
    """Opens a folder, which need not exist, to write checkpoints, ``folder/<step>``. Each is whole or does not exist.

    All processes open it, once `remove_later` is done, and save at the same steps. Without an error, its end waits
    until everything is written.

    Args:
        folder: the checkpoints' folder.
        origin: the run's origin.
        keep: how many of the last to keep. The best by evaluation loss is kept, too.

    Raises:
        InputError: the folder cannot be used, or a checkpoint could not be written.
    """
    loss = lambda metrics: metrics["eval_loss"]
    policies = [
        ocp.checkpoint_managers.LatestN(keep),
        ocp.checkpoint_managers.BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False),
    ]
    options = ocp.CheckpointManagerOptions(
        best_fn=loss,  # without it metrics are not written
        best_mode="min",
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
        todelete_subdir=_REMOVED,
    )
    with quiet():
        saver = Saver(_manager(folder, options), origin)
        yield saver
        saver.wait()
        saver.manager.close()


def _manager(folder: Path, options: Any) -> ocp.CheckpointManager:
    try:
        return ocp.CheckpointManager(folder.absolute(), options=options)
    except Exception as error:
        broken = [step for step in steps_in(folder) if not _has_metrics_or_none(folder / str(step))]
        if not broken:
            raise InputError(f"the checkpoints in {folder} cannot be used: {one_line(error)}") from error
        raise InputError(
            f"the checkpoint of step {broken[0]} in {folder} has a damaged evaluation loss, without which none can "
            f"be opened: {one_line(error)}; move {folder / str(broken[0])} out of that folder"
        ) from error


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending, whole or damaged; none if there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if _is_step(path.name) and path.is_dir())


def foreign_in(folder: Path) -> list[Path]:
    """Paths there with a checkpoint's name and no record. Orbax would take them for checkpoints, and remove them."""
    paths = [folder / str(step) for step in steps_in(folder)]
    return [path for path in paths if not (path / "record").is_dir()]


def best_step(folder: Path) -> int | None:
    """The step of the checkpoint with the lowest evaluation loss; None if no checkpoint has one.

    Raises:
        ValueError: a checkpoint is damaged.
    """
    losses = {step: read_record(folder / str(step)).eval_loss for step in steps_in(folder)}
    return min(((loss, step) for step, loss in losses.items() if loss is not None), default=(None, None))[1]


def read_record(path: Path) -> Record:
    """The record of a checkpoint. No array is read.

    Args:
        path: of the checkpoint, ``.../checkpoints/<step>``.

    Raises:
        ValueError: there is no checkpoint, it is damaged, or not of such a run.
    """
    record = unsealed(_read(path, record=ocp.args.JsonRestore())["record"])
    if str(record.step) != path.name:
        raise ValueError(f"it says that it is of the step {record.step}")
    return record


def restore(path: Path, record: Record, params: Any, state: Any) -> tuple[Any, Any]:
    """The parameters and the optimizer state of a checkpoint, each part read by the devices that keep it.

    Args:
        path: the checkpoint's path.
        record: what `read_record` found there.
        params: a tree of ``jax.ShapeDtypeStruct``s; those without a sharding go to the first device.
        state: a tree of the same kind.

    Raises:
        ValueError: it is damaged, or has other arrays.
    """
    restored = _restore_items(path, record, {"params": params, "state": state})
    return restored["params"], restored["state"]


def restore_params(path: Path) -> tuple[dict[str, Any], DecoderConfig]:
    """The parameters of a checkpoint alone, on the first device, and the sizes of their model.

    ``nnx.merge(graphdef, adalomo_jax.floats(params))`` is the `Decoder`. The tokenizer is two folders above.

    Args:
        path: of the checkpoint, ``.../checkpoints/<step>``.

    Raises:
        ValueError: there is no checkpoint, or it is damaged.
    """
    record = read_record(path)
    try:
        config = config_of({k: v for k, v in record.origin.model.items() if k != "name"})
        shapes = kept(param_shapes(config, record.origin.options["dtype"]), record.origin.options.get("weights"))
    except (LookupError, TypeError) as error:
        raise ValueError(f"its record is of no model that this version reads: {one_line(error)}") from None
    return _restore_items(path, record, {"params": shapes})["params"], config


def remove_later(folder: Path, after: int) -> None:
    """Remove the checkpoints of later steps, the last one first, so that a kill leaves no gap between them."""
    _empty_removed(folder)  # left by an earlier start that was killed
    for step in reversed(steps_in(folder)):
        if step > after:
            (folder / _REMOVED).mkdir(exist_ok=True)
            (folder / str(step)).rename(folder / _REMOVED / str(step))
    _empty_removed(folder)


def _empty_removed(folder: Path) -> None:
    if (folder / _REMOVED).is_dir():
        shutil.rmtree(folder / _REMOVED)


def _restore_items(path: Path, record: Record, trees: dict[str, Any]) -> dict[str, Any]:
    wanted = {name: jax.tree.map(_placed, _named(tree)) for name, tree in trees.items()}
    args = {
        name: ocp.args.PyTreeRestore(shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes))
        for name, shapes in wanted.items()
    }
    found = _read(path, **args)
    for name in trees:
        sums, expected = checksums(found[name]), record.checksums.get(name, {})
        wrong = [key for key in sums if sums[key] != expected.get(key)]
        if wrong:
            raise ValueError(f"the array {name}.{wrong[0]} is not what was saved")
    leaves = {name: [found[name][key] for key in _named(tree)] for name, tree in trees.items()}
    return {name: jax.tree.unflatten(jax.tree.structure(tree), leaves[name]) for name, tree in trees.items()}


def _read(path: Path, **args: Any) -> dict[str, Any]:
    """Items of a checkpoint. Orbax's errors for damaged files, of which there is no list, become a ValueError."""
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}")
    try:
        with quiet(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(path.absolute(), args=ocp.args.Composite(**args))
    except Exception as error:
        raise ValueError(one_line(cast(Exception, error.__cause__ or error))[:300]) from error
    return {name: found[name] for name in args}


def _has_metrics_or_none(path: Path) -> bool:
    """False for a file of metrics that is not JSON. Orbax's manager reads all of them at once, and names none."""
    try:
        ocp.JsonCheckpointHandler(filename="metrics").restore(cast(Any, path.absolute() / "metrics"))
    except FileNotFoundError:
        return True
    except Exception:
        return False
    return True


def _is_step(name: str) -> bool:
    """Whether Orbax gives such a name: not 007."""
    return name.isdecimal() and name == str(int(name))


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by path, in order: the same for each kind of tree, whether Orbax knows it or not."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _placed(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return shape if shape.sharding is not None else shape.update(sharding=SingleDeviceSharding(jax.local_devices()[0]))


def _reason(error: Exception) -> str:
    """If the disk is full, TensorStore says RESOURCE_EXHAUSTED, the file and much else."""
    is_full = any(words in str(error) for words in ("No space left", "Disk quota", "RESOURCE_EXHAUSTED"))
    return "the disk is full" if is_full else one_line(error)[:300]


def _there_are(steps: list[int]) -> str:
    return f"the folder has those of the steps {', '.join(map(str, steps))}" if steps else "the folder has no other one"
