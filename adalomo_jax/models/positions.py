"""Where positions are, and what of it a layer sees: its rotary angles, and whether it has the sliding window.

Letters in names of arrays: T position, H width of a head, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.rotary import rotary_angles

Traits = dict[str, jax.Array]
"""What differs from layer to layer, by name: bools ``[L]``, or one layer's. Nothing if all layers are alike."""


class Position(NamedTuple):
    """The positions of a sequence, as one layer sees them."""

    cos: jax.Array
    """``[T, H / 2]``, float32."""
    sin: jax.Array
    is_windowed: jax.Array | None
    """Whether the layer has the window; None if all layers have it."""


class Positions:
    """The positions of a sequence, for all layers of a model.

    Args:
      config: the model.
      length: how many positions.
      first: the first of them; it may be traced.
      room: the length of the whole sequence that they are a part of; None if they are all of it.
    """

    def __init__(self, config: DecoderConfig, length: int, *, first: int | jax.Array = 0, room: int | None = None):
        angles = lambda theta, scaling: rotary_angles(
            length, config.rotary_dim, theta, scaling, first=first, positions=room
        )
        self._angles = angles(config.rope_theta, config.rope_scaling)
        self._local = None if config.local_rope_theta is None else angles(config.local_rope_theta, None)
        self._has_window = config.sliding_window is not None
        of_layers = lambda pattern: np.resize(np.array(pattern), config.num_hidden_layers)
        differing = {"is_windowed": config.windowed, "is_rotated": config.rotated}
        self.traits: Traits = {
            name: jnp.asarray(of_layers(pattern)) for name, pattern in differing.items() if len(pattern) > 1
        }
        """The inputs of a scan over the layers."""
        self._all_windowed, self._all_rotated = config.windowed[0], config.rotated[0]

    def of_layer(self, traits: Traits) -> Position:
        """The positions as the layer with these traits sees them."""
        cos, sin = self._angles
        is_windowed = traits.get("is_windowed")
        if self._local is not None:
            is_local = self._all_windowed if is_windowed is None else is_windowed
            cos, sin = (jnp.where(is_local, ours, other) for ours, other in zip(self._local, self._angles, strict=True))
        if "is_rotated" in traits:
            cos, sin = (jnp.where(traits["is_rotated"], x, still) for x, still in ((cos, 1.0), (sin, 0.0)))
        elif not self._all_rotated:
            cos, sin = jnp.ones_like(cos), jnp.zeros_like(sin)
        return Position(cos, sin, is_windowed if self._has_window else None)
