"""NNX models whose layers are in a list, and a plain NNX loop to compare with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adalomo_jax import adalomo

WIDTH, LAYERS, STEPS = 8, 4, 5


X = jax.random.normal(jax.random.key(0), (4, WIDTH))


TX = adalomo(1e-2)


class Plain(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Noisy(nnx.Module):
    """A layer with running means, dropout, and a count of its calls."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.calls = nnx.Cache(jnp.zeros([], jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return x + self.dropout(jnp.tanh(self.norm(self.linear(x))))


class Adapted(nnx.Module):
    """A frozen matrix with a trained adapter."""

    def __init__(self, rngs):
        self.lora = nnx.LoRA(WIDTH, 2, WIDTH, base_module=nnx.Linear(WIDTH, WIDTH, rngs=rngs), rngs=rngs)
        self.lora.lora_b[...] = 0.1 * jax.random.normal(rngs.params(), (2, WIDTH))  # if zero, lora_a has no gradient

    def __call__(self, x):
        return x + jnp.tanh(self.lora(x))


class Model(nnx.Module):
    def __init__(self, block: Any = Plain, layers=LAYERS, remat=True):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([block(rngs) for _ in range(layers)])
        self.head = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.remat = remat

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.remat(lambda layer, x: layer(x))(layer, x) if self.remat else layer(x)
        return self.head(x)


def loss_fn(model, x):
    return jnp.mean(jnp.square(model(x) - jnp.sin(x)))


class Reference:
    """The same model under nnx.Optimizer, with plain Optax."""

    def __init__(self, model, wrt: Any = nnx.Param, tx=TX):
        self.model, self.optimizer = model, nnx.Optimizer(model, tx, wrt=wrt)

        @nnx.jit
        def train(model, optimizer, x):
            loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, wrt))(model, x)
            optimizer.update(model, grads)
            return loss

        self.train = train

    def step(self, x=X):
        return self.train(self.model, self.optimizer, x)


def arrays(node, *filters):
    return jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(node, *filters)))


def assert_equal(model, other, rtol=1e-5):
    """Both hold equal values."""
    for (path, a), (_, b) in zip(
        *(jax.tree_util.tree_leaves_with_path(arrays(m)) for m in (model, other)), strict=True
    ):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = map(jax.random.key_data, (a, b))
        np.testing.assert_allclose(a, b, rtol, 1e-6, err_msg=jax.tree_util.keystr(path))
