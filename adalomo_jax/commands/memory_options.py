"""The options of the command ``memory``, and what makes them invalid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from adalomo_jax.inputs import InputError, batch_parts, check_preset, default, mesh_sizes, one_line
from adalomo_jax.pretrained.hub import fetch_sizes, is_hub_name
from adalomo_jax.rules import HELP, Optimizer
from adalomo_jax.training.config import Weights
from adalomo_jax.training.output_folder import check_picture

if TYPE_CHECKING:
    from adalomo_jax.models import DecoderConfig


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Compile the step of finetune for a chip that you need not have, and report its memory and whether it fits.

    The chip's own compiler compiles the step. Nothing runs.
    TPUs need adalomo-jax[tpu-aot] installed, NVIDIA's GPUs adalomo-jax[cuda-aot]."""

    # tyro keeps the line breaks of these texts: a line is a sentence.
    model: str = "llama-2-7b"
    """Preset: tiny, smollm2-135m, smollm3-3b, llama-2-7b, llama-2-13b, llama-65b, llama-3-8b,
    llama-3.1-8b, llama-3.1-70b, llama-3.2-1b, llama-3.2-3b, mistral-7b, qwen3-0.6b, qwen3-1.7b, qwen3-4b, qwen3-8b,
    qwen3-14b, qwen3-32b, qwen3-30b-a3b, mixtral-8x7b, gemma-2-2b, gemma-2-9b, gemma-3-1b, gemma-3-4b, gemma-3-12b,
    gemma-3-27b, phi-4-mini, phi-4, olmo-2-7b or granite-3-8b.
    Or a file: a config.json in Hugging Face's format. Or a name on the hub: Qwen/Qwen3-0.6B."""
    device: Literal["tpu-v5e", "tpu-v5p", "tpu-v6e", "h100", "rtx-4090", "rtx-4070", "cpu"] = "tpu-v5e"
    """The chip to compile for; cpu is this machine's."""
    batch_size: int = 1
    """Sequences in a step, on all chips together."""
    microbatches: int = 1
    """Split each batch into so many parts, to save memory. The step sums their gradients layer by layer."""
    seq_len: int = 2048
    """Length of a sequence, in tokens. It may be longer than the model was made for."""
    optimizer: Annotated[Optimizer, arg(help=HELP)] = "adalomo"
    fused: bool = True
    """Update each layer during the backward pass; --no-fused computes all gradients first."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of weights and activations."""
    weights: Annotated[Weights | None, default("as --dtype says")] = None
    """Keep the matrices of the layers in one byte a weight (int8), or in three (bf16+8), between the steps."""
    compare: bool = False
    """Add rows for the unfused step and for the other optimizers."""
    chips: int = 1
    """How many chips the step is spread over. Of TPUs, a power of two."""
    shard: Annotated[str | None, default("no axes", metavar="AXIS=N[,AXIS=N]")] = None
    """How to split the step over the chips, such as fsdp=8,tensor=2. The product must be --chips.
    data splits the batch; fsdp splits the batch and the parameters; tensor splits each layer's width."""
    offload: Annotated[Literal["params", "activations"] | None, default("nothing")] = None
    """Keep these in the host's memory, and stream them to the chip layer by layer.
    Only fused steps can; the unfused rows of --compare keep all on the chip."""
    estimate: bool = False
    """Print a lower bound from shapes instead of compiling. It needs no compiler.
    It counts the arguments, and the larger of the gradients alive at once and what the forward pass saves."""
    json: bool = False
    """Print one JSON object for each row, and nothing else. Sizes are in bytes."""
    output: Annotated[Path | None, default("memory.png under the current folder, and with --json none")] = None
    """The picture to draw: a stacked bar for each row, and the chip's limit."""


def check_memory_options(config: MemoryConfig) -> None:
    """Raise InputError for the first option that cannot be used, before anything is compiled or written."""
    sizes = mesh_sizes(config.shard, "--shard")
    rows = batch_parts(sizes)
    product = " x ".join(map(str, sizes.values())) or "none"
    parts = config.microbatches
    checks = {
        f"--batch-size must be at least 1 sequence, got {config.batch_size}": config.batch_size >= 1,
        f"--microbatches must be at least 1 and divide the {config.batch_size} of --batch-size, got {parts}": (
            parts >= 1 and config.batch_size % parts == 0
        ),
        f"--seq-len must be at least 2 tokens, one to read and one to predict, got {config.seq_len}": (
            config.seq_len >= 2
        ),
        f"--chips must be at least 1, got {config.chips}": config.chips >= 1,
        f"--chips {config.chips} must be the product of the sizes in --shard, which are {product}": (
            math.prod(sizes.values()) == config.chips
        ),
        f"--batch-size {config.batch_size} must be a multiple of {rows}, the product of data and fsdp in --shard": (
            config.batch_size % rows == 0
        ),
        "--estimate works for one chip only; for several, leave it out and compile": not config.estimate
        or config.chips == 1,
        "--offload needs the fused step; leave --no-fused out": config.offload is None or config.fused,
        "--estimate does not know --offload: leave --estimate out and compile": not (
            config.estimate and config.offload
        ),
    }
    for message, holds in checks.items():
        if not holds:
            raise InputError(message)


def model_sizes(name: str, presets: Mapping[str, DecoderConfig]) -> DecoderConfig:
    """The sizes of a preset, of a ``config.json``, or of a model on the hub."""
    path = Path(name)
    if name in presets:
        return presets[name]
    on_hub = is_hub_name(name)
    if path.suffix != ".json" and not on_hub:
        check_preset(name, list(presets), or_file="the path of a config.json, or owner/model on the hub")
    from adalomo_jax.models import from_hugging_face
    from adalomo_jax.pretrained.json_files import read_json

    try:
        return from_hugging_face(fetch_sizes(name) if on_hub else read_json(path), name)
    except ValueError as error:
        raise InputError(f"--model {one_line(error)}") from None


def picture(config: MemoryConfig) -> Path | None:
    """The path to draw to, checked but not written; None if nothing is drawn."""
    path = config.output
    if path is None:
        if config.json:
            return None
        path = Path("memory.png")
    check_picture(path)
    return path
