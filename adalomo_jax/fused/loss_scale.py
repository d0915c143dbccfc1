"""Loss scaling: a factor on the loss keeps float16 gradients in range; each layer's update takes it out again."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LossScaleState(NamedTuple):
    """The state of a dynamic loss scale."""

    scale: jax.Array
    """float32."""
    finite_steps: jax.Array
    """Steps since the scale changed, int32."""


class DynamicLossScale(NamedTuple):
    """A loss scale that halves when a gradient is not finite, and doubles after many steps with finite gradients.

    ``fuse(..., loss_scale=DynamicLossScale())`` multiplies the loss by it, and divides each gradient by it, in float32,
    before ``tx`` sees it. A step whose loss or gradients are not finite writes nothing but the smaller scale.

    Args:
      initial: the scale of the first step.
      growth_interval: steps with finite gradients after which the scale grows.
      factor: the factor by which it grows and shrinks.
      smallest: the least scale.
      largest: the greatest scale.

    Source: Micikevicius et al. (2018), https://arxiv.org/abs/1710.03740, section 3.2; the numbers are those of
    PyTorch's ``GradScaler``, which begins at 2**16.

    Example:
      >>> import jax.numpy as jnp
      >>> scaling = DynamicLossScale(initial=8.0)
      >>> float(scaling.update(scaling.init(), jnp.array(False)).scale)
      4.0
    """

    initial: float = 2.0**15
    growth_interval: int = 2000
    """Steps with finite gradients after which the scale grows."""
    factor: float = 2.0
    smallest: float = 1.0
    largest: float = 2.0**24

    def init(self) -> LossScaleState:
        """The state to begin with."""
        return LossScaleState(jnp.float32(self.initial), jnp.int32(0))

    def update(self, state: LossScaleState, finite: jax.Array) -> LossScaleState:
        """The state after a step; ``finite`` says whether its loss and gradients were all finite."""
        steps = jnp.where(finite, state.finite_steps + 1, 0)
        grows = steps >= self.growth_interval
        grown = jnp.minimum(state.scale * self.factor, self.largest)
        shrunk = jnp.maximum(state.scale / self.factor, self.smallest)
        scale = jnp.where(finite, jnp.where(grows, grown, state.scale), shrunk)
        return LossScaleState(scale, jnp.where(grows, 0, steps))
