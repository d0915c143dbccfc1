"""Trains a Flax Linen model whose layers are scanned, with the fused step.

    python examples/flax_linen.py

The model and its loss are the same as for Optax alone. The step of `TrainState` replaces `jax.value_and_grad` and the
`apply_gradients` of Flax's own `TrainState`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from adalomo_jax import adalomo
from adalomo_jax.linen import TrainState

VOCAB, WIDTH, LAYERS, LENGTH, STEPS = 32, 64, 4, 32, 150


class Block(nn.Module):
    """One residual layer, in the form that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.SelfAttention(num_heads=4)(h, mask=nn.make_causal_mask(x[..., 0]))
        h = nn.LayerNorm()(x)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(h))), None


class LanguageModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, WIDTH)(tokens) + self.param("positions", nn.initializers.normal(0.02), (LENGTH, WIDTH))
        layers = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = layers()(x, None)
        return nn.Dense(VOCAB)(nn.LayerNorm()(x))


model = LanguageModel()


def loss_fn(params, tokens):
    log_p = jax.nn.log_softmax(jnp.asarray(model.apply({"params": params}, tokens)))
    return -jnp.mean(jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1))


def batch(seed):
    """Sequences that count up from a random start: the next token is predictable."""
    starts = jax.random.randint(jax.random.key(seed), (16, 1), 0, VOCAB)
    return (starts + jnp.arange(LENGTH)) % VOCAB


def main():
    params = jax.jit(model.init)(jax.random.key(0), batch(0))["params"]
    state = TrainState.create(batch(0), loss_fn=loss_fn, params=params, tx=adalomo(5e-3))
    print(state.plan(batch(0)))

    losses = []
    for i in range(STEPS):
        state, result = state.step(batch(i))
        losses.append(float(result.loss))
        if i % 25 == 0 or i == STEPS - 1:
            print(f"step {i:>3}  loss {losses[-1]:.4f}  gradient norm {result.metrics['grad_norm']:.3f}")
    assert losses[-1] < losses[0] / 10


if __name__ == "__main__":
    main()
