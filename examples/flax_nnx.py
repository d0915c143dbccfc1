"""Trains a Flax NNX model, Llama, in bfloat16 with the fused step, and lets it continue a text.

    python examples/flax_nnx.py

The step writes weights with stochastic rounding: rounded to nearest, most of the steps would vanish in bfloat16.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adalomo_jax import adalomo
from adalomo_jax.models import Decoder, DecoderConfig, generate, next_token_loss
from adalomo_jax.nnx import FusedOptimizer

CONFIG = DecoderConfig(
    vocab_size=256,  # bytes
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)
STEPS, BATCH, LENGTH = 120, 16, 64


def batches():
    """Random pieces of a Python module's source, as bytes."""
    text = np.frombuffer(inspect.getsource(inspect).encode(), np.uint8)
    generator = np.random.default_rng(0)
    while True:
        starts = generator.integers(0, len(text) - LENGTH, BATCH)
        yield jnp.asarray(text[starts[:, None] + np.arange(LENGTH)], jnp.int32)


def main():
    model = Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    stream = batches()
    optimizer = FusedOptimizer(model, adalomo(2e-2), next_token_loss, next(stream))

    losses = []
    for i in range(STEPS):
        loss = optimizer.step(model, next(stream)).loss
        losses.append(float(loss))
        if i % 20 == 0 or i == STEPS - 1:
            print(f"step {i:>3}  loss {loss:.3f} nats per byte")

    prompt = jnp.asarray(np.frombuffer(b"    def ", np.uint8)[None], jnp.int32)
    tokens = generate(model, prompt, 60, key=jax.random.key(0), temperature=0.5)
    print(bytes(np.asarray(tokens[0], np.uint8)).decode(errors="replace"))
    assert losses[-1] < losses[0] - 2


if __name__ == "__main__":
    main()
