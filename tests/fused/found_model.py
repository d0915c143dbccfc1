"""What a model as found consists of, and the data that all of them are trained on."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Sizes(NamedTuple):
    """Of a model and its batch."""

    layers: int = 3
    dim: int = 8
    batch: int = 2
    length: int = 4

    @property
    def hidden(self) -> int:
        """The width between the two matrices of a feed-forward layer."""
        return 2 * self.dim


class Model(NamedTuple):
    """A loss, what it is called with, and what one expects of it."""

    loss_fn: Callable[..., Any]
    """``loss_fn(params, *batch(i))``."""
    params: Any
    batch: Callable[[int], tuple[Any, ...]]
    layered: Mapping[str, int]
    """Paths of leaves, or of what they are in, that are updated layer by layer, with their layers. Others are whole."""
    has_aux: bool = False

    def layers_of(self, path: str) -> int | None:
        """The layers of a leaf; None where it is expected to be updated whole."""
        lengths = [n for prefix, n in self.layered.items() if path == prefix or path.startswith(f"{prefix}/")]
        return lengths[0] if lengths else None

    @property
    def stacks(self) -> list[jax.Array]:
        """The leaves that are expected to be updated layer by layer."""
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        return [x for path, x in leaves if self.layers_of(jax.tree_util.keystr(path, simple=True, separator="/"))]


def inputs(sizes: Sizes, i: int) -> jax.Array:
    """Floats of shape ``[batch, length, dim]``."""
    shape = (sizes.batch, sizes.length, sizes.dim)
    return jnp.asarray(np.random.default_rng(100 + i).standard_normal(shape, np.float32))


def error(y: Any, x: jax.Array) -> jax.Array:
    """The mean squared error of the model's ``y``, which should be a function of ``x``, in float32."""
    return jnp.mean(jnp.square(y.astype(jnp.float32) - jnp.sin(3 * x)))
