"""The contestants: ways to turn a loss into a training step."""

from __future__ import annotations

from typing import Literal, NamedTuple

from adalomo_jax.rules import Optimizer
from adalomo_jax.training.config import Weights

How = Literal["fused", "unfused", "optax", "gradients", "gradients in place"]


class Contestant(NamedTuple):
    """A step to measure."""

    name: str
    """The name that the table shows."""
    how: How
    """``fused`` and ``unfused`` are `fuse`'s step and its twin; ``optax`` is ``jax.value_and_grad``, ``tx.update`` and
    ``optax.apply_updates`` in one jit; ``gradients`` computes gradients alone, into new memory; ``gradients in place``
    writes them over the last ones."""
    optimizer: Optimizer | None = None
    """A rule of the table; None is Optax's plain SGD."""
    max_grad_norm: float | None = None
    microbatches: int | None = None
    stochastic_rounding: bool | None = None
    """Stochastic rounding of narrow weights; None is the default of `fuse`."""
    weights: Weights | None = None
    """The form that keeps the matrices of the layers; None keeps them as floats."""


REFERENCE = "adalomo, fused"
"""The contestant that the others are compared with."""
OFFICIAL = "lomo-optim (PyTorch)"
"""Not one of these: it is measured only on request."""

CONTESTANTS = (
    Contestant(REFERENCE, "fused", "adalomo"),
    Contestant("adalomo, fused, to nearest", "fused", "adalomo", stochastic_rounding=False),
    Contestant("adalomo, fused, int8", "fused", "adalomo", weights="int8"),
    Contestant("adalomo, fused, bf16+8", "fused", "adalomo", weights="bf16+8"),
    Contestant("adalomo, fused, clipped", "fused", "adalomo", max_grad_norm=1.0),
    Contestant("adalomo, fused, 4 microbatches", "fused", "adalomo", microbatches=4),
    Contestant("adalomo, unfused", "unfused", "adalomo"),
    Contestant("lomo, fused", "fused", "lomo"),
    Contestant("lomo, fused, clipped", "fused", "lomo", max_grad_norm=1.0),
    Contestant("adamw, fused", "fused", "adamw"),
    Contestant("adamw, unfused", "optax", "adamw"),
    Contestant("adafactor, unfused", "optax", "adafactor"),
    Contestant("sgd, unfused", "optax"),
    Contestant("forward and backward", "gradients"),
    Contestant("forward and backward, in place", "gradients in place"),
)
NAMES = tuple(contestant.name for contestant in CONTESTANTS)


class Case(NamedTuple):
    """What a step is measured on."""

    model: str
    """The model's name."""
    layers: int
    batch_size: int
    seq_len: int
    dtype: str


def contestants_of(case: Case, only: tuple[str, ...] | None) -> list[Contestant]:
    """The contestants that can be measured on a case. `REFERENCE` is always among them."""
    wanted = NAMES if only is None else (REFERENCE, *only)
    divides = lambda contestant: case.batch_size % (contestant.microbatches or 1) == 0
    is_other = lambda contestant: contestant.stochastic_rounding is None or case.dtype != "float32"
    return [c for c in CONTESTANTS if c.name in wanted and divides(c) and is_other(c)]
