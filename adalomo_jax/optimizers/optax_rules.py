"""Optax's own rules as the commands offer them, with a float32 state, whatever the weights' type.

Optax keeps the state in the weights' type. In bfloat16, its 8 bits round most of a slow moving average away.
"""

import optax

from adalomo_jax.optimizers.precision import in_float32


def adamw(learning_rate: optax.ScalarOrSchedule, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """``optax.adamw`` in float32."""
    return in_float32(optax.adamw(learning_rate, weight_decay=weight_decay), needs_params=True)


def adafactor(learning_rate: optax.ScalarOrSchedule, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """``optax.adafactor`` in float32. The decay is a share of the weights per step, without the learning rate."""
    return in_float32(optax.adafactor(learning_rate, weight_decay_rate=weight_decay or None), needs_params=True)
