"""A training run from its options to the files it leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from adalomo_jax.commands.failures import reason_of
from adalomo_jax.commands.find_lr import find_lr
from adalomo_jax.inputs import InputError, Stopped, batch_parts, check_preset, mesh_sizes, one_line
from adalomo_jax.models import PRESETS, decoder_of, from_hugging_face, generate
from adalomo_jax.pretrained.by_name import Pretrained, export_rest, find_model
from adalomo_jax.pretrained.checkpoint import PACKAGED
from adalomo_jax.pretrained.export import export_params
from adalomo_jax.pretrained.files import write_whole
from adalomo_jax.pretrained.hub import Download
from adalomo_jax.run_files import METRICS
from adalomo_jax.text.data import Data, load_data
from adalomo_jax.text.data_sets import Reading
from adalomo_jax.training.checkpoints.record import Origin, Record
from adalomo_jax.training.checkpoints.resume import (
    check_finished,
    checkpoints_of,
    drop_weights_set_aside,
    earlier_rows,
    find_checkpoint,
    is_finished,
    origin_of,
    restored,
    set_weights_aside,
)
from adalomo_jax.training.checkpoints.save import open_saver, remove_later
from adalomo_jax.training.checkpoints.stopping import stop_requests
from adalomo_jax.training.config import FinetuneConfig, check_options, checkpoint_interval, columns_by_field
from adalomo_jax.training.devices import (
    check_agreed,
    connect,
    gather,
    is_first_process,
    mesh_of,
    told_to_all,
    wait_for_all,
)
from adalomo_jax.training.fits import check_fits
from adalomo_jax.training.loop import Trained, train
from adalomo_jax.training.metrics import Row, append_row, to_json, write_rows
from adalomo_jax.training.output_folder import check_held, claimed, output_folder
from adalomo_jax.training.plots import plot_losses, plot_run
from adalomo_jax.training.program import Program, build_program, check_attention
from adalomo_jax.training.summary import progress_bar, summarize, summary_table, warned_of
from adalomo_jax.training.tensorboard import event_file

SAMPLE_LENGTH = 200
"""Most tokens of the sample at the end of a run."""


def run(config: FinetuneConfig, console: Console | None = None) -> Path:
    """Train, write the output folder, and print a sample and a report.

    Raises:
        InputError: an option, a checkpoint or a text cannot be used, and nothing is compiled or written then; or a
            checkpoint could not be written.
        Stopped: a signal has ended the run, and everything is saved.
    """
    model = model_of(config.model, partial(check_before_fetch, config))
    check_options(config, model.config)
    connect(config)
    check_attention(config, model.config, jax.default_backend())
    mesh, is_first = mesh_of(config), is_first_process()
    console = (console or Console()) if is_first else Console(quiet=True)
    folder = output_folder(config)
    if config.resume and config.resume_step is None and is_finished(folder):
        check_finished(config, folder, model, partial(data_of, config, model, folder))
        console.print(f"the run in {folder} is finished", markup=False, highlight=False, soft_wrap=True)
        return folder
    with contextlib.ExitStack() as stack:
        with told_to_all():
            if is_first:
                stack.enter_context(claimed(folder))
                check_held(folder, resume=config.resume)  # again: another run may have ended there meanwhile
        try:
            return _run_in(folder, config, model, mesh, console)
        except (InputError, Stopped, BrokenPipeError):  # they say what has happened
            raise
        except Exception as error:
            reason = reason_of(error)
            if reason is None or not (folder / METRICS).exists():
                raise
            raise InputError(
                f"the run in {folder} has failed: {reason}; mend that, and give the same command with --output "
                f"{folder} --resume"
            ) from error


def _run_in(folder: Path, config: FinetuneConfig, model: Pretrained, mesh: Mesh | None, console: Console) -> Path:
    """The run, in a folder that it has for itself."""
    with told_to_all():
        data = data_of(config, model, folder)
        origin = origin_of(config, model, data)
        start = find_checkpoint(config, folder, origin)
        rows = earlier_rows(config, folder, start)
    check_agreed(agreement(config, origin, start))
    console.print(str(data.report), markup=False, highlight=False, soft_wrap=True)  # it has names of files
    if config.find_lr:
        return find_lr(config, model, data, mesh, folder, console, writes=is_first_process())
    if config.resume:
        where = f"after step {start.step}" if start else f"from the beginning: there is no checkpoint in {folder}"
        console.print(f"continuing {where}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"writing to {folder}", markup=False, highlight=False, soft_wrap=True)
    console.print("compiling", highlight=False)
    program = build_program(config, model, mesh, restore=start and partial(restored, folder, start))
    wait_for_all("the output folder is checked")
    if is_first_process():
        set_weights_aside(folder)  # first of all: a run that is cut off from here on is not finished
        export_rest(folder, model, config.dtype)
        # In this order: a kill between them leaves rows of later steps, which do no harm, and no gap.
        remove_later(checkpoints_of(folder), start.step if start else 0)
        if config.resume:
            write_rows(folder / METRICS, rows)
    wait_for_all("checkpoints of later steps are removed")
    trained = _train_with_rows(program, config, data, rows, folder, origin, start, mesh, console)
    if trained.stopped_at is not None:
        raise Stopped(
            f"stopped after step {trained.stopped_at}, which is saved; to go on, give the same options with "
            f"--output {folder} --resume"
        )
    export_params(folder, trained.params, model.config, fetch=gather, writes=is_first_process())
    summary = summarize(config, model.name, program, trained, rows)
    if is_first_process():
        # From here on the weights are written, and no error loses them.
        title = f"{model.name}, {config.optimizer}"
        for name, draw in (("loss.png", plot_losses), ("run.png", plot_run)):
            with warned_of(f"{name} could not be drawn"):
                draw(folder / name, rows, title)
        # The last file: see is_finished.
        write_whole(folder / "summary.json", lambda path: path.write_text(to_json(summary) + "\n", encoding="utf-8"))
    with warned_of("no sample of text could be made"):  # a program of its own
        console.print(sample(model, trained.params, data, config), markup=False, highlight=False)
    console.print(summary_table(summary))
    console.print(f"written to {folder}", markup=False, highlight=False, soft_wrap=True)
    return folder


def _train_with_rows(
    program: Program,
    config: FinetuneConfig,
    data: Data,
    rows: list[Row],
    folder: Path,
    origin: Origin,
    start: Record | None,
    mesh: Mesh | None,
    console: Console,
) -> Trained:
    """Runs `train_saving`, and adds its rows to these, to the files of metrics, and to the progress bar."""
    events = event_file(folder, start.step + 1 if start else 0) if is_first_process() else contextlib.nullcontext()
    with progress_bar(console, config.steps) as show, events as write_event:

        def on_row(row: Row) -> None:
            rows.append(row)
            if write_event is not None:
                append_row(folder / METRICS, row)
                write_event(row)
            show(row)

        return train_saving(program, config, data, on_row, folder, origin, start, mesh)


def agreement(config: FinetuneConfig, origin: Origin, start: Record | None) -> dict[str, str]:
    """What must be equal in all processes of a run, by its name in the error."""
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("process", "data", "model")}
    return {
        "options": json.dumps(options | dict(origin.options), sort_keys=True, default=str),
        "sizes of --model": json.dumps(dict(origin.model), sort_keys=True, default=str),
        "text of --data": origin.data,
        "checkpoint to continue from": str(start and start.step),
    }


def train_saving(
    program: Program,
    config: FinetuneConfig,
    data: Data,
    on_row: Callable[[Row], None],
    folder: Path,
    origin: Origin,
    start: Record | None,
    mesh: Mesh | None,
) -> Trained:
    """Runs `train`, with checkpoints and SIGTERM handling, unless the options ask for no checkpoints."""
    if not checkpoint_interval(config):
        return train(program, config, data, on_row, start=start)
    with (
        stop_requests(mesh) as is_asked_to_stop,  # outermost: schedulers send SIGTERM again while a save is written
        open_saver(checkpoints_of(folder), origin, keep=config.keep) as saver,
    ):
        trained = train(program, config, data, on_row, start=start, save=saver.save, is_asked_to_stop=is_asked_to_stop)
    if trained.stopped_at is None and is_first_process():
        drop_weights_set_aside(folder)
    return trained


def check_before_fetch(config: FinetuneConfig, download: Download) -> None:
    """Says what is fetched, after it has refused options that cannot be used and a model that cannot fit."""
    model = from_hugging_face(download.config)
    check_options(config, model)
    check_fits(config, model)
    print(download, file=sys.stderr)


def model_of(name: str, before_fetch: Callable[[Download], object] | None = None) -> Pretrained:
    """The model that ``--model`` names, fetched if it is on the hub; see `find_model`."""
    if "/" not in name and not Path(name).exists() and name not in PACKAGED:
        check_preset(name, list(PRESETS), or_file=f"or {', '.join(PACKAGED)}, or a checkpoint's folder or .gguf file")
    try:
        return find_model(name, before_fetch)
    except ValueError as error:
        raise InputError(f"--model {name}: {one_line(error)}") from None


def data_of(config: FinetuneConfig, model: Pretrained, output: Path | None) -> Data:
    """The text that the options name, as the model's tokens, without files in the output folder."""
    parts = batch_parts(mesh_sizes(config.mesh, "--mesh"))
    try:
        return load_data(
            config.data,
            model.tokenizer,
            seq_len=config.seq_len,
            parts=parts,
            skip_bad=config.skip_bad,
            output=output,
            reading=Reading(config.split, config.subset, columns_by_field(config)),
            before_fetch=lambda download: print(download, file=sys.stderr),
        )
    except ValueError as error:
        raise InputError(f"--data with the tokenizer of {model.name}: {one_line(error)}") from None


def sample(model: Pretrained, params: Any, data: Data, config: FinetuneConfig) -> str:
    """The start of the evaluation text and, after a bar, how the model continues it."""
    first = data.evaluation.take(np.array(0))
    document = first.tokens_BT[first.segments_BT == 1]
    prompt = document[: max(1, min(len(document), config.seq_len) // 4)]
    length = min(SAMPLE_LENGTH, config.seq_len - len(prompt))

    @jax.jit
    def continued(params, prompt_BP):
        # No mesh can spread one sequence, and not every kernel takes any length.
        llama = decoder_of(model.config, params)
        return generate(llama, prompt_BP, length, key=jax.random.key(config.seed), temperature=0.7)

    tokens = gather(continued(params, prompt[None]))[0]
    text = model.tokenizer.decode(tokens)
    read = len(os.path.commonprefix([text, model.tokenizer.decode(prompt)]))  # a prompt may end within a character
    return f"{text[:read]}|{text[read:]}"
