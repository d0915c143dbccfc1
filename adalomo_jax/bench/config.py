"""The options of the command ``bench``, and what makes them invalid."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
from pathlib import Path
from typing import Annotated, Literal

from adalomo_jax.bench.contestants import NAMES
from adalomo_jax.inputs import InputError, default
from adalomo_jax.training.output_folder import check_folder

Dtype = Literal["float32", "bfloat16"]
LOMO_OPTIM = ("torch", "transformers", "lomo_optim")
"""The packages that ``--against lomo-optim`` needs."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Measure what a training step costs by each optimizer, fused and not.

    Each optimizer runs in a process of its own. All take steps in turn, so that a busy machine slows all alike.
    Without options, it measures SmolLM2-135M on sequences of 64 and 512 tokens, in some 15 minutes on two CPU cores."""

    # tyro keeps the line breaks of these texts: a line is a sentence.
    model: tuple[str, ...] = ("smollm2-135m",)
    """Presets, such as tiny, smollm2-135m, llama-2-7b or qwen3-4b; adalomo-jax memory --help lists them.
    Or files: a config.json in Hugging Face's format. Weights are random."""
    batch_size: int = 1
    """Sequences in a step."""
    seq_len: tuple[int, ...] = (64, 512)
    """Lengths of sequences, in tokens."""
    layers: Annotated[tuple[int, ...] | None, default("the model's own", metavar="INT [INT ...]")] = None
    """Numbers of layers to give the models, at their width.
    With several numbers, the command draws time and memory against depth, and fits a line to the times."""
    dtype: tuple[Dtype, ...] = ("float32",)
    """Types of weights and activations."""
    only: Annotated[tuple[str, ...] | None, default("all", metavar="NAME [NAME ...]")] = None
    """What to measure, by the names in the table, such as "adalomo, fused" "adamw, unfused".
    It always measures adalomo, fused, and compares the others with it."""
    rounds: int = 9
    """How many steps each optimizer takes, after two to warm up."""
    against: Annotated[Literal["lomo-optim"] | None, default("nothing else")] = None
    """Measure the official PyTorch AdaLomo too, with the same sizes, activation checkpoints and number of threads.
    It needs the packages torch, transformers and lomo-optim, and sizes that Hugging Face's Llama can have."""
    output: Annotated[Path | None, default("runs/bench-<time> under the current folder")] = None
    """Folder for bench.json and the pictures."""


def check_bench_options(config: BenchConfig) -> None:
    """Raise InputError for the first option that cannot be used, before anything is compiled or written."""
    many = {"--model": config.model, "--seq-len": config.seq_len, "--dtype": config.dtype, "--layers": config.layers}
    unknown = [name for name in config.only or () if name not in NAMES]
    missing = [name for name in LOMO_OPTIM if config.against and importlib.util.find_spec(name) is None]
    install = " ".join(name.replace("_", "-") for name in missing)
    checks = {f"{option} must be followed by at least one value": values != () for option, values in many.items()}
    checks |= {
        f"--batch-size must be at least 1 sequence, got {config.batch_size}": config.batch_size >= 1,
        f"--seq-len must be at least 2 tokens, one to read and one to predict, got {min(config.seq_len, default=0)}": (
            min(config.seq_len, default=2) >= 2
        ),
        f"--layers must be at least 1, got {min(config.layers or (1,))}": min(config.layers or (1,)) >= 1,
        f"--rounds must be at least 3, for a median, got {config.rounds}": config.rounds >= 3,
        f"--only takes {'; '.join(NAMES)}, got {'; '.join(unknown)}": not unknown,
        f"--against lomo-optim needs {install}: pip install {install}": not missing,
        "--against lomo-optim needs --dtype float32: with it, both are the same rule": (
            config.against is None or config.dtype == ("float32",)
        ),
    }
    for message, holds in checks.items():
        if not holds:
            raise InputError(message)


def bench_folder(config: BenchConfig) -> Path:
    """The output folder, checked but not created; existing results are not replaced."""
    folder = config.output or Path("runs") / f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    check_folder(folder)
    if (folder / "bench.json").exists():
        raise InputError(f"--output {folder} holds results already (bench.json); name another folder")
    return folder
