"""Models in Flax Linen, as users write them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from found_model import Model, Sizes, error, inputs


class Block(nn.Module):
    """A pre-norm transformer layer; without heads, only its feed-forward half."""

    hidden: int
    dtype: Any = None
    heads: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, _):
        if self.heads:
            attention = nn.MultiHeadDotProductAttention(self.heads, use_bias=False, dtype=self.dtype)
            x = x + attention(nn.LayerNorm(dtype=self.dtype)(x))
        h = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)))
        h = nn.Dropout(self.dropout, deterministic=False)(h)
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(h), None


class NormedBlock(nn.Module):
    """A residual layer with batch normalization, without the bias that this would cancel."""

    hidden: int

    @nn.compact
    def __call__(self, x, _):
        h = nn.Dense(self.hidden, use_bias=False)(x)
        h = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9)(h))
        return x + nn.Dense(x.shape[-1])(h), None


class Group(nn.Module):
    """A scan over two layers, as one layer of an outer scan."""

    hidden: int

    @nn.compact
    def __call__(self, x, _):
        return scanned(Block, 2)(self.hidden, name="inner")(x, None)


class Net(nn.Module):
    """Scanned layers and a head."""

    layers: Any
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        x, _ = self.layers(name="layers")(x, None)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="head")(nn.LayerNorm(dtype=self.dtype, name="norm")(x))


def scanned(layer: Any, length: int, axis: int = 0) -> Any:
    """A module of layers under remat, with their parameters stacked on an axis."""
    return nn.scan(
        nn.remat(layer, prevent_cse=False),
        variable_axes={"params": axis, "batch_stats": 0},
        split_rngs={"params": True, "dropout": True},
        length=length,
    )


def stacked(sizes: Sizes, *, axis: int = 0, dtype: Any = None, heads: int = 0, cast_tree: bool = False) -> Model:
    """Layers stacked on an axis. They compute in ``dtype``: the modules cast, or the loss casts the tree first."""
    net = Net(partial(scanned(Block, sizes.layers, axis), sizes.hidden, dtype, heads), dtype)

    def loss_fn(params, x):
        if cast_tree:
            params = jax.tree.map(lambda p: p.astype(dtype), params)
        return error(net.apply({"params": params}, x), x)

    variables = jax.jit(net.init)(jax.random.key(0), inputs(sizes, 0))
    return Model(loss_fn, variables["params"], lambda i: (inputs(sizes, i),), {"layers": sizes.layers})


def dropout(sizes: Sizes) -> Model:
    """The batch contains the key for the layers' dropout."""
    net = Net(partial(scanned(Block, sizes.layers), sizes.hidden, dropout=0.2))

    def loss_fn(params, x, key):
        return error(net.apply({"params": params}, x, rngs={"dropout": key}), x)

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.jit(net.init)(keys, inputs(sizes, 0))
    batch = lambda i: (inputs(sizes, i), jax.random.key(i))
    return Model(loss_fn, variables["params"], batch, {"layers": sizes.layers})


def batch_norm(sizes: Sizes) -> Model:
    """The batch contains the running statistics, and the loss returns the new ones as aux."""
    net = Net(partial(scanned(NormedBlock, sizes.layers), sizes.hidden))

    def loss_fn(params, batch_stats, x):
        y, updated = net.apply({"params": params, "batch_stats": batch_stats}, x, mutable=["batch_stats"])
        return error(y, x), updated["batch_stats"]

    variables = jax.jit(net.init)(jax.random.key(0), inputs(sizes, 0))
    batch = lambda i: (jax.tree.map(lambda s: s + 0.1 * i, variables["batch_stats"]), inputs(sizes, i))
    return Model(loss_fn, variables["params"], batch, {"layers": sizes.layers}, has_aux=True)


def nested(sizes: Sizes) -> Model:
    """A scan in a scan: parameters of shape ``[groups, 2, ...]``."""
    net = Net(partial(scanned(Group, sizes.layers), sizes.hidden))
    variables = jax.jit(net.init)(jax.random.key(0), inputs(sizes, 0))
    loss_fn = lambda params, x: error(net.apply({"params": params}, x), x)
    return Model(loss_fn, variables["params"], lambda i: (inputs(sizes, i),), {"layers": sizes.layers})


MODELS = {
    "linen": stacked,
    "linen axis 1": partial(stacked, axis=1, heads=2),
    "linen bfloat16": partial(stacked, dtype=jnp.bfloat16),
    "linen axis 1 bfloat16": partial(stacked, axis=1, dtype=jnp.bfloat16),
    "linen cast": partial(stacked, dtype=jnp.bfloat16, cast_tree=True),
    "linen axis 1 cast": partial(stacked, axis=1, dtype=jnp.bfloat16, cast_tree=True),
    "linen dropout": dropout,
    "linen batch norm": batch_norm,
    "linen nested": nested,
}
