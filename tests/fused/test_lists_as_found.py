"""Models with lists of layers as libraries make them: two lines more, and equal to plain Optax on their own trees."""

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import copied, relative_error
from flax import linen as nn

from adalomo_jax import adalomo, fuse

DIM, LAYERS = 8, 4
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, DIM)), jnp.float32)


def error(y: Any, x: jax.Array) -> jax.Array:
    """Of what a model makes of its inputs."""
    return jnp.mean(jnp.square(y - jnp.sin(x)))


class LinenBlock(nn.Module):
    """A residual layer."""

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(DIM)(nn.gelu(nn.Dense(2 * DIM)(nn.RMSNorm()(x))))


class LinenLoop(nn.Module):
    """A loop over submodules, each under remat."""

    @nn.compact
    def __call__(self, x):
        for _ in range(LAYERS):
            x = nn.remat(LinenBlock)()(x)
        return nn.Dense(DIM)(x)


def linen():
    model = LinenLoop()
    params = model.init(jax.random.key(0), X)["params"]
    return lambda params, x: error(model.apply({"params": params}, x), x), params


class Attention(nn.Module):
    """The shape of Flax's lm1b example: attention and a feed-forward layer behind norms, with a mask and dropout.

    Without biases in attention: a key's has no gradient but rounding errors, which AdaLomo makes steps of.
    """

    @nn.compact
    def __call__(self, x, mask, deterministic=False):
        y = nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.1, use_bias=False)(
            nn.LayerNorm()(x), mask=mask, deterministic=deterministic
        )
        x = x + nn.Dropout(0.1)(y, deterministic=deterministic)
        return x + nn.Dense(DIM)(nn.relu(nn.Dense(2 * DIM)(nn.LayerNorm()(x))))


class LanguageModel(nn.Module):
    """Named layers, as in lm1b."""

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        for i in range(LAYERS):
            x = Attention(name=f"encoderdecoderblock_{i}")(x, mask)
        return nn.Dense(DIM)(x)


def lm1b():
    model = LanguageModel()
    params = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)["params"]

    def loss(params, x):
        return error(model.apply({"params": params}, x, rngs={"dropout": jax.random.key(2)}), x)

    return loss, params


def haiku():
    def forward(x):
        for _ in range(LAYERS):
            x = x + hk.Linear(DIM)(jax.nn.gelu(hk.Linear(2 * DIM)(hk.LayerNorm(-1, True, True)(x))))
        return hk.Linear(DIM)(x)

    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), X)
    return lambda params, x: error(model.apply(params, x), x), params


class EquinoxBlock(eqx.Module):
    """A residual layer of one token."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        keys = jax.random.split(key)
        self.up, self.down = eqx.nn.Linear(DIM, 2 * DIM, key=keys[0]), eqx.nn.Linear(2 * DIM, DIM, key=keys[1])
        self.norm = eqx.nn.LayerNorm(DIM)

    def __call__(self, x):
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


class EquinoxModel(eqx.Module):
    """A list of layers."""

    layers: list[EquinoxBlock]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def equinox():
    model = EquinoxModel([EquinoxBlock(key) for key in jax.random.split(jax.random.key(0), LAYERS)])
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, x):
        return error(jax.vmap(jax.vmap(eqx.combine(params, static)))(x), x)

    return loss, params


MODELS = {"linen": (linen, 5), "lm1b": (lm1b, 12), "haiku": (haiku, 6), "equinox": (equinox, 6)}
"""With the number of a layer's parameters."""


@pytest.mark.parametrize("name", MODELS)
def test_equals_optax_on_the_models_own_tree(name):
    (loss_fn, params), of_layer = MODELS[name][0](), MODELS[name][1]
    step, tx = fuse(loss_fn, adalomo(1e-2)), adalomo(1e-2)
    placed = copied(step.place(params, X))
    stacked = [leaf for leaf in step.plan(placed, X).leaves if leaf.layers == LAYERS]
    assert len(stacked) == of_layer and all(len(leaf.layer_paths) == LAYERS for leaf in stacked)
    state, expected, of_optax = step.init(placed, X), params, tx.init(params)

    @jax.jit
    def by_optax(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params, X), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        placed, state, *_ = step.jit(placed, state, X)
        expected, of_optax = by_optax(expected, of_optax)
    assert relative_error(step.unplace(placed), expected) < 1e-5
    assert relative_error(expected, params) > 1e-3
