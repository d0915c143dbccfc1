"""Unchanged Keras 3 models take two more lines and equal plain Optax on the list of variables that Keras takes."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import copied, relative_error
from tiers import always

from adalomo_jax import adalomo, fuse

os.environ["KERAS_BACKEND"] = "jax"
keras = pytest.importorskip("keras")

DIM, LAYERS = 8, 4
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, DIM)), jnp.float32)


def functional():
    """A causal transformer with dropout. Each layer that draws has its own seed, which each call advances."""
    x = inputs = keras.Input(X.shape[1:])
    for _ in range(LAYERS):
        y = keras.layers.LayerNormalization()(x)
        attention = keras.layers.MultiHeadAttention(2, DIM // 2, dropout=0.1, use_bias=False)
        x = keras.layers.Add()([x, attention(y, y, use_causal_mask=True)])
        y = keras.layers.Dense(2 * DIM, "gelu", use_bias=False)(keras.layers.LayerNormalization(center=False)(x))
        x = x + keras.layers.Dropout(0.1)(keras.layers.Dense(DIM)(y))
    return keras.Model(inputs, keras.layers.Dense(DIM)(x))


class Block(keras.layers.Layer):
    """A residual layer with running means. All blocks share one source of random numbers."""

    def __init__(self, seed):
        super().__init__()
        self.norm = keras.layers.BatchNormalization()
        self.dense = keras.layers.Dense(DIM, activation="tanh", use_bias=False)
        self.seed = seed

    def call(self, x, training=False):
        return x + keras.random.dropout(self.dense(self.norm(x, training=training)), 0.1, seed=self.seed)


class Subclassed(keras.Model):
    """A list of layers."""

    def __init__(self):
        super().__init__()
        seed = keras.random.SeedGenerator(0)
        self.blocks = [Block(seed) for _ in range(LAYERS)]
        self.head = keras.layers.Dense(DIM)

    def call(self, x, training=False):
        for block in self.blocks:
            x = block(x, training=training)
        return self.head(x)


MODELS = {"functional": (functional, 10), "subclassed": (Subclassed, 3)}
"""Each model, with the number of trained variables of a layer."""


@pytest.mark.parametrize("name", always(MODELS, ["subclassed"]))
def test_equals_optax_on_the_models_own_list(name):
    """The weights, the seeds and the running means are equal."""
    keras.utils.set_random_seed(0)
    model, of_layer = MODELS[name][0](), MODELS[name][1]
    model(X)  # creates its variables

    def loss_fn(params, others, x):
        y, others = model.stateless_call(params, others, x, training=True)
        return jnp.mean(jnp.square(y - jnp.sin(x))), others

    params = [v.value for v in model.trainable_variables]
    others = first = [v.value for v in model.non_trainable_variables]
    step, tx = fuse(loss_fn, adalomo(1e-2), has_aux=True, roll=4), adalomo(1e-2)
    placed = copied(step.place(params, others, X))
    assert [leaf.layers for leaf in step.plan(placed, others, X).leaves] == [LAYERS] * of_layer + [None, None]
    state, expected, of_optax, its_others = step.init(placed, others, X), params, tx.init(params), others

    @jax.jit
    def by_optax(params, state, others):
        grads, others = jax.grad(loss_fn, has_aux=True)(params, others, X)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, others

    for _ in range(5):
        placed, state, _, others, _ = step.jit(placed, state, others, X)
        expected, of_optax, its_others = by_optax(expected, of_optax, its_others)
    assert relative_error(step.unplace(placed), expected) < 1e-5
    assert relative_error(expected, params) > 1e-3
    for ours, theirs, before in zip(others, its_others, first, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        assert (ours != before).any()
