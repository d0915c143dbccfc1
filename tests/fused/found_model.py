"""The description of a found model, and the data that all found models are trained on."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Sizes(NamedTuple):
    """The sizes of a model and its batch."""

    layers: int = 3
    dim: int = 8
    batch: int = 2
    length: int = 4

    @property
    def hidden(self) -> int:
        """The width between the two matrices of a feed-forward layer."""
        return 2 * self.dim


class Model(NamedTuple):
    """A loss, its arguments, and how its parameters should be updated."""

    loss_fn: Callable[..., Any]
    """``loss_fn(params, *batch(i))``."""
    params: Any
    batch: Callable[[int], tuple[Any, ...]]
    layered: Mapping[str, int]
    """Paths (or prefixes) of leaves that are updated layer by layer, and their layers. Others are updated whole."""
    has_aux: bool = False

    def layers_of(self, path: str) -> int | None:
        """The number of layers of a leaf; None if it should be updated whole."""
        lengths = [n for prefix, n in self.layered.items() if path == prefix or path.startswith(f"{prefix}/")]
        return lengths[0] if lengths else None

    @property
    def stacks(self) -> list[jax.Array]:
        """The leaves that should be updated layer by layer."""
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        return [x for path, x in leaves if self.layers_of(jax.tree_util.keystr(path, simple=True, separator="/"))]


def inputs(sizes: Sizes, i: int) -> jax.Array:
    """Floats of shape ``[batch, length, dim]``."""
    shape = (sizes.batch, sizes.length, sizes.dim)
    return jnp.asarray(np.random.default_rng(100 + i).standard_normal(shape, np.float32))


def error(y: Any, x: jax.Array) -> jax.Array:
    """The mean squared error, in float32, of the model's ``y``; the target is a function of ``x``."""
    return jnp.mean(jnp.square(y.astype(jnp.float32) - jnp.sin(3 * x)))
