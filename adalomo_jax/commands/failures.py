"""What goes wrong outside of a program, in one line: full disks, and too little memory."""

from __future__ import annotations

import os
import re

from adalomo_jax.inputs import one_line

_LONGEST = 300


def reason_of(error: BaseException) -> str | None:
    """What the system has refused, and the way out; None if the error is the program's own.

    Libraries that write files wrap the system's errors, each in its own words.

    >>> reason_of(OSError(28, "No space left on device", "/data/run/metrics.jsonl"))
    'No space left on device: /data/run/metrics.jsonl'
    >>> reason_of(ValueError("x must be positive")) is None
    True
    """
    for cause in (error, error.__cause__):
        text = one_line(cause)[:_LONGEST] if isinstance(cause, Exception) else ""
        if isinstance(cause, OSError) and cause.errno is not None:
            place = f": {cause.filename}" if cause.filename is not None else ""
            return f"{os.strerror(cause.errno)}{place}"
        if "No space left" in text or "Disk quota" in text:  # before memory: TensorStore says RESOURCE_EXHAUSTED, too
            return text
        if isinstance(cause, MemoryError) or "Out of memory" in text or text.startswith("RESOURCE_EXHAUSTED"):
            return (
                f"there is not enough memory ({text or 'of this process'}); adalomo-jax memory says what a run takes; "
                "a smaller --batch-size or --seq-len, --dtype bfloat16 or --mesh takes less"
            )
        if match := re.search(r"\(os error (\d+)\)", text):  # from Rust: safetensors, tokenizers
            return f"{os.strerror(int(match[1]))}: {text}"
    return None
