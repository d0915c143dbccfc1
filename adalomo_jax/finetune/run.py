"""A training run from its options to the files it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from adalomo_jax.finetune.config import FinetuneConfig, batch_parts, check_options, mesh_sizes, output_folder
from adalomo_jax.finetune.data import Text, load_text
from adalomo_jax.finetune.devices import connect, gather, is_first_process, mesh_of
from adalomo_jax.finetune.loop import train
from adalomo_jax.finetune.metrics import Row, append_row
from adalomo_jax.finetune.plot import plot_losses
from adalomo_jax.finetune.program import build_program
from adalomo_jax.finetune.report import progress_bar, run_table
from adalomo_jax.models import PRESETS, Llama, LlamaConfig, generate, to_hugging_face
from adalomo_jax.pretrained.export import export_config, export_params

SAMPLE_LENGTH = 200
"""Most bytes of the sample at the end of a run."""


def run(config: FinetuneConfig, console: Console | None = None) -> Path:
    """Train, write the output folder, and print a sample and a report.

    Raises:
        InputError: an option or a text cannot be used. Nothing has been compiled or written then.
    """
    check_options(config, PRESETS)
    connect(config)
    mesh, is_first = mesh_of(config), is_first_process()
    console = (console or Console()) if is_first else Console(quiet=True)
    folder = output_folder(config)
    text = load_text(config.data, config.seq_len, batch_parts(mesh_sizes(config.mesh, "--mesh")))
    console.print(f"{len(text.train):,} bytes to train on, {len(text.evaluation):,} to evaluate on; compiling")
    program = build_program(config, mesh)
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)

    rows: list[Row] = []
    with progress_bar(console, config.steps) as show:

        def on_row(row: Row) -> None:
            rows.append(row)
            if is_first:
                append_row(folder / "metrics.jsonl", row)
            show(row)

        trained = train(program, config, text, on_row)

    continuation = sample(program.config, trained.params, text, config)
    export_params(folder, trained.params, program.config, fetch=gather, writes=is_first)
    if is_first:
        sizes = to_hugging_face(program.config, config.dtype)
        export_config(folder, program.config, config.dtype, sizes | {"tokens": "bytes: token i is byte i of UTF-8"})
        plot_losses(folder / "loss.png", rows, f"{config.model}, {config.optimizer}")
    console.print(continuation, markup=False, highlight=False)
    console.print(run_table(config, program, trained, rows))
    console.print(f"written to {folder}", highlight=False, soft_wrap=True)
    return folder


def sample(model_config: LlamaConfig, params: Any, text: Text, config: FinetuneConfig) -> str:
    """The start of the evaluation text and, after a bar, how the model continues it."""
    prompt = text.evaluation[: max(1, config.seq_len // 4)]
    length = min(SAMPLE_LENGTH, config.seq_len - len(prompt))
    # One sequence, which no mesh can spread, of any length, which not every kernel takes.
    dtype = jnp.dtype(config.dtype)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(model_config, rngs=nnx.Rngs(0), dtype=dtype)))

    @jax.jit
    def continued(params, prompt_BP):
        model: Llama = nnx.merge(graphdef, params)
        return generate(model, prompt_BP, length, key=jax.random.key(config.seed), temperature=0.7)

    tokens = gather(continued(params, np.asarray(prompt[None], np.int32)))[0]
    return f"{decode(prompt)}|{decode(tokens[len(prompt) :])}"


def decode(tokens: np.ndarray) -> str:
    """Bytes as text; what is no UTF-8, or no byte, is a replacement character."""
    return bytes(int(token) if token < 256 else 0xFF for token in tokens).decode("utf-8", errors="replace")
