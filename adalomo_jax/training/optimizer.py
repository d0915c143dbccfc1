"""The update rule and its learning rate, from the options."""

from __future__ import annotations

import optax

from adalomo_jax import adalomo, lomo
from adalomo_jax.models import PRESETS
from adalomo_jax.optimizers.precision import in_float32
from adalomo_jax.training.config import FinetuneConfig

LEARNING_RATES = {"adalomo": 3e-2, "lomo": 3e-1, "adamw": 3e-3, "adafactor": 3e-2}
"""Peak learning rates that suit the tiny model from random weights."""
TUNED_LEARNING_RATES = {"adalomo": 1e-3, "lomo": 1e-2, "adamw": 2e-4, "adafactor": 1e-3}
"""Peak learning rates to start from where weights are trained further: the best of examples/further_pretraining.py.
That of lomo is for gradients that are not clipped, with which it was not compared."""


def make_schedule(config: FinetuneConfig) -> optax.Schedule:
    """Learning rate by step, the first step being 0: a linear warmup, then the schedule, which ends at ``steps``."""
    peak = peak_learning_rate(config)
    warmup = warmup_steps(config)
    rest = max(1, config.steps - warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, after], [warmup])


def make_range_schedule(config: FinetuneConfig, below: float, above: float, steps: int) -> optax.Schedule:
    """A learning rate that rises exponentially, from and to these multiples of the optimizer's own peak."""
    return optax.exponential_decay(below * peak_learning_rate(config), steps - 1, above / below)


def make_optimizer(config: FinetuneConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The rule that the options name. The moments of adamw are float32, whatever the weights are."""
    if config.optimizer == "adafactor":
        return optax.adafactor(schedule, weight_decay_rate=config.weight_decay or None)
    if config.optimizer == "adamw":
        return in_float32(optax.adamw(schedule, weight_decay=config.weight_decay), needs_params=True)
    rule = {"adalomo": adalomo, "lomo": lomo}[config.optimizer]
    return rule(schedule, weight_decay=config.weight_decay)


def peak_learning_rate(config: FinetuneConfig) -> float:
    """The option, or what suits the optimizer and whether the weights start random."""
    if config.learning_rate is not None:
        return config.learning_rate
    return (LEARNING_RATES if config.model in PRESETS else TUNED_LEARNING_RATES)[config.optimizer]


def warmup_steps(config: FinetuneConfig) -> int:
    """The option, or what suits the number of steps."""
    return min(10, config.steps // 10) if config.warmup_steps is None else config.warmup_steps
