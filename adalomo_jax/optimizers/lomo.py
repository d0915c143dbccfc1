"""LOMO, AdaLomo's predecessor, as an Optax gradient transformation."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adalomo_jax.optimizers.arguments import (
    check_above_zero,
    check_learning_rate,
    check_not_negative,
    checked_mask,
)
from adalomo_jax.optimizers.precision import in_float32


def lomo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    clip_value: float | jax.Array | None = None,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """LOMO: plain SGD, made for the fused step. It has no state but a schedule's step count.

    Equals, for each tensor ``theta`` with gradient ``g``, in float32::

        g = clip(g, -clip_value, clip_value)
        theta = theta - learning_rate(t) * (g + weight_decay * theta)

    Args:
      learning_rate: a float, at least 0, or a schedule of the step count, which starts at 0.
      clip_value: the largest magnitude of a gradient's entry, above 0; None clips nothing.
      weight_decay: decoupled, multiplied by the learning rate.
      weight_decay_mask: as in ``optax.add_decayed_weights``.

    Returns:
      A transformation whose updates have the gradients' dtypes.

    Raises:
      ValueError: an argument is out of its range; in ``init`` and ``update``, leaves are not floats.

    Example:
      >>> import jax.numpy as jnp
      >>> from adalomo_jax import lomo
      >>> tx = lomo(0.1, clip_value=1.0)
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, _ = tx.update(jnp.array([0.5, 30.0]), tx.init(params), params)
      >>> print(updates)
      [-0.05 -0.1 ]

    Source: Lv et al., https://arxiv.org/abs/2306.09782, algorithm 1.
    """
    check_learning_rate(learning_rate)
    if clip_value is not None:
        check_above_zero("clip_value", clip_value, "; pass None to clip nothing")
    check_not_negative("weight_decay", weight_decay)
    mask = checked_mask("weight_decay_mask", weight_decay_mask)
    decays = not isinstance(weight_decay, (int, float)) or weight_decay != 0.0
    return in_float32(
        optax.chain(
            optax.identity() if clip_value is None else _clip(clip_value),
            optax.add_decayed_weights(weight_decay, mask) if decays else optax.identity(),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def _clip(most: float | jax.Array) -> optax.GradientTransformation:
    """Bounds the magnitude of each entry; a complex entry keeps its direction."""

    def clip(g: jax.Array) -> jax.Array:
        return g * (most / jnp.maximum(jnp.abs(g), most)) if jnp.iscomplexobj(g) else jnp.clip(g, -most, most)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))
