"""The memory of a training step on one chip, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adalomo_jax.memory.collectives import Collectives


@dataclass(frozen=True)
class Usage:
    """Bytes that a training step needs on each chip. Figures that a refusal leaves out are None."""

    params_bytes: int
    """Bytes of the parameters that lie on the chip."""
    state_bytes: int
    """Bytes of the optimizer state."""
    gradient_bytes: int
    """The most gradients alive at once, in the parameters' dtypes."""
    saved_bytes: int
    """What the forward pass saves for the backward pass: rematerialized layers' inputs, or all residuals of others."""
    argument_bytes: int | None
    """The step's arguments: parameters, state, batch."""
    alias_bytes: int | None
    """The arguments that share their memory with results: parameters and state, updated in place."""
    output_bytes: int | None
    """What the step returns."""
    temp_bytes: int | None
    """What it needs in addition, saved inputs and gradients included."""
    peak_bytes: int
    """``argument_bytes + output_bytes - alias_bytes + temp_bytes``; if refused, what the compiler named."""
    host_bytes: int
    """The same sum for the host's memory."""
    limit_bytes: int
    """Bytes that a program may use on the chip."""
    compile_seconds: float
    estimated: bool = False
    """Whether this is a lower bound from shapes, without a compiler."""
    refused: bool = False
    """Whether the compiler refused the program for lack of memory."""
    collectives: Mapping[str, Collectives] = field(default_factory=dict)
    """What the program's devices send each other, by kind; nothing on one device."""

    @property
    def fits(self) -> bool:
        """Whether the step can run."""
        return not self.refused and self.peak_bytes <= self.limit_bytes

    @property
    def spare_bytes(self) -> int:
        """What remains of the limit; negative if the step does not fit."""
        return self.limit_bytes - self.peak_bytes

    @property
    def other_bytes(self) -> int:
        """The peak without parameters, state, gradients and saved inputs; 0 if those overlap."""
        named = self.params_bytes + self.state_bytes + self.gradient_bytes + self.saved_bytes
        return max(0, self.peak_bytes - named)


def peak_of(sizes: Any) -> int:
    """The sum of arguments, outputs that are no arguments, and temporaries, from ``compiled.memory_analysis()``."""
    new_outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + new_outputs + sizes.temp_size_in_bytes


def format_bytes(count: int | None) -> str:
    """Decimal units: 1 GB is 10**9 bytes."""
    if count is None:
        return "not known"
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
