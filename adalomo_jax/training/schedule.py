"""Learning rates, from the options."""

from __future__ import annotations

import optax

from adalomo_jax.models import PRESETS
from adalomo_jax.rules import RULES
from adalomo_jax.training.config import FinetuneConfig


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


def peak_learning_rate(config: FinetuneConfig) -> float:
    """The option, or the rate that suits the optimizer and whether the weights start random."""
    if config.learning_rate is not None:
        return config.learning_rate
    rule = RULES[config.optimizer]
    return rule.random_rate if config.model in PRESETS else rule.tuned_rate


def warmup_steps(config: FinetuneConfig) -> int:
    """The option, or the number that suits the number of steps."""
    return min(10, config.steps // 10) if config.warmup_steps is None else config.warmup_steps
