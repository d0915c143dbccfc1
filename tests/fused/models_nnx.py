"""Models in Flax NNX, as users write them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from found_model import Model, Sizes, error, inputs


class Block(nnx.Module):
    """A residual feed-forward layer."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(sizes.dim, rngs=rngs)
        self.up = nnx.Linear(sizes.dim, sizes.hidden, rngs=rngs)
        self.down = nnx.Linear(sizes.hidden, sizes.dim, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.silu(self.up(self.norm(x))))


class Calls(nnx.Variable):
    """How often a layer was called."""


class NormedBlock(nnx.Module):
    """A residual layer with batch normalization and a counter."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(sizes.dim, sizes.hidden, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(sizes.hidden, momentum=0.9, rngs=rngs)
        self.down = nnx.Linear(sizes.hidden, sizes.dim, rngs=rngs)
        self.calls = Calls(jnp.zeros([], jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return x + self.down(nnx.relu(self.norm(self.up(x))))


class Scanned(nnx.Module):
    """Stacked layers, scanned, and a head."""

    def __init__(self, block: Callable[..., Any], sizes: Sizes, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=sizes.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return block(sizes, rngs=rngs)

        self.blocks = make(rngs)
        self.head = nnx.Linear(sizes.dim, sizes.dim, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def forward(block, x):
            return block(x)

        return self.head(forward(self.blocks, x))


class Unrolled(nnx.Module):
    """A list of layers and a head."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(sizes, rngs=rngs) for _ in range(sizes.layers)])
        self.head = nnx.Linear(sizes.dim, sizes.dim, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return self.head(x)


def scanned(sizes: Sizes) -> Model:
    """Layers that vmap makes and a scan runs."""
    graphdef, params = nnx.split(Scanned(Block, sizes, rngs=nnx.Rngs(0)), nnx.Param)
    loss_fn = lambda params, x: error(nnx.merge(graphdef, params)(x), x)
    return Model(loss_fn, params, lambda i: (inputs(sizes, i),), {"blocks": sizes.layers})


def with_state(sizes: Sizes) -> Model:
    """The batch contains the untrained variables, and the loss returns their new values as aux."""
    graphdef, params, rest = nnx.split(Scanned(NormedBlock, sizes, rngs=nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(params, rest, x):
        model = nnx.merge(graphdef, params, rest, copy=True)  # the model assigns to its variables
        loss = error(model(x), x)
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    return Model(loss_fn, params, lambda i: (rest, inputs(sizes, i)), {"blocks": sizes.layers}, has_aux=True)


def unrolled(sizes: Sizes) -> Model:
    """Layers in a list, called in a Python loop."""
    graphdef, params = nnx.split(Unrolled(sizes, rngs=nnx.Rngs(0)), nnx.Param)
    loss_fn = lambda params, x: error(nnx.merge(graphdef, params)(x), x)
    return Model(loss_fn, params, lambda i: (inputs(sizes, i),), {})


MODELS = {"nnx scan": scanned, "nnx state": with_state, "nnx list": unrolled}
