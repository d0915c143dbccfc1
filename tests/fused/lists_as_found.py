"""Models with their layers in a list, as users of each framework write them: functions of their sizes, by name."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn
from found_model import Model, Sizes, error, inputs


class LinenBlock(nn.Module):
    """A residual layer."""

    hidden: int

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(self.hidden)(nn.RMSNorm()(x))))


class LinenLoop(nn.Module):
    """A loop over submodules, each under remat."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x):
        for _ in range(self.sizes.layers):
            x = nn.remat(LinenBlock)(self.sizes.hidden)(x)
        return nn.Dense(self.sizes.dim)(x)


def linen(sizes: Sizes) -> Model:
    """A loop makes the layers."""
    model = LinenLoop(sizes)
    params = jax.jit(model.init)(jax.random.key(0), inputs(sizes, 0))["params"]
    loss_fn = lambda params, x: error(model.apply({"params": params}, x), x)
    return Model(loss_fn, params, lambda i: (inputs(sizes, i),), {})


class Attention(nn.Module):
    """The shape of Flax's lm1b example: attention and a feed-forward layer behind norms, with a mask and dropout.

    Attention has no biases: the gradient of a key's bias is only rounding errors, which AdaLomo would turn into steps.
    """

    hidden: int

    @nn.compact
    def __call__(self, x, mask, deterministic=False):
        y = nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.1, use_bias=False)(
            nn.LayerNorm()(x), mask=mask, deterministic=deterministic
        )
        x = x + nn.Dropout(0.1)(y, deterministic=deterministic)
        return x + nn.Dense(x.shape[-1])(nn.relu(nn.Dense(self.hidden)(nn.LayerNorm()(x))))


class LanguageModel(nn.Module):
    """Named layers, as in lm1b."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        for i in range(self.sizes.layers):
            x = Attention(self.sizes.hidden, name=f"encoderdecoderblock_{i}")(x, mask)
        return nn.Dense(self.sizes.dim)(x)


def lm1b(sizes: Sizes) -> Model:
    """The dropout key is a constant."""
    model = LanguageModel(sizes)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = jax.jit(model.init)(keys, inputs(sizes, 0))["params"]

    def loss_fn(params, x):
        return error(model.apply({"params": params}, x, rngs={"dropout": jax.random.key(2)}), x)

    return Model(loss_fn, params, lambda i: (inputs(sizes, i),), {})


def haiku(sizes: Sizes) -> Model:
    """Haiku numbers the modules."""

    def forward(x):
        for _ in range(sizes.layers):
            h = jax.nn.gelu(hk.Linear(sizes.hidden)(hk.LayerNorm(-1, True, True)(x)))
            x = x + hk.Linear(sizes.dim)(h)
        return hk.Linear(sizes.dim)(x)

    model = hk.without_apply_rng(hk.transform(forward))
    params = jax.jit(model.init)(jax.random.key(0), inputs(sizes, 0))
    loss_fn = lambda params, x: error(model.apply(params, x), x)
    return Model(loss_fn, params, lambda i: (inputs(sizes, i),), {})


class EquinoxBlock(eqx.Module):
    """A residual layer for one token."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(self, sizes: Sizes, key: jax.Array):
        keys = jax.random.split(key)
        self.up = eqx.nn.Linear(sizes.dim, sizes.hidden, key=keys[0])
        self.down = eqx.nn.Linear(sizes.hidden, sizes.dim, key=keys[1])
        self.norm = eqx.nn.LayerNorm(sizes.dim)

    def __call__(self, x):
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


class EquinoxModel(eqx.Module):
    """A list of layers."""

    layers: list[EquinoxBlock]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def equinox(sizes: Sizes) -> Model:
    """The inexact arrays are trained. The loss maps the model over the batch."""
    keys = jax.random.split(jax.random.key(0), sizes.layers)
    params, static = eqx.partition(EquinoxModel([EquinoxBlock(sizes, key) for key in keys]), eqx.is_inexact_array)

    def loss_fn(params, x):
        return error(jax.vmap(jax.vmap(eqx.combine(params, static)))(x), x)

    return Model(loss_fn, params, lambda i: (inputs(sizes, i),), {})


MODELS = {"linen": linen, "lm1b": lm1b, "haiku": haiku, "equinox": equinox}
