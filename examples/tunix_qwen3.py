"""Shows a training loop for somebody else's model, before and after: tunix's Qwen3, which has its layers in a list.

    pip install google-tunix adalomo-jax
    python examples/tunix_qwen3.py

Both loops train the same weights on the same tokens, and end at the same loss. In the second, only one layer's
gradients exist at a time, and the layers stay stacked between the steps. Read the model after `unplace`.
"""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adalomo_jax import adalomo
from adalomo_jax.nnx import FusedOptimizer

qwen3: Any = importlib.import_module("tunix.models.qwen3.model")
STEPS, LENGTH = 8, 64
SMALL = dict(num_layers=6, vocab_size=256, embed_dim=64, hidden_dim=128, num_heads=4, head_dim=16, num_kv_heads=2)
CONFIG = dataclasses.replace(qwen3.ModelConfig.qwen3_0p6b(), **SMALL, remat_config=qwen3.RematConfig.DECODER)


def loss_fn(model, tokens):
    """The mean cross-entropy of the next byte."""
    shape = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((shape[1], shape[1]), bool)), (shape[0], shape[1], shape[1]))
    logits, _ = model(tokens, positions, None, mask)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)
    return -jnp.mean(picked)


def batches():
    """Bytes of this file."""
    text = np.frombuffer(open(__file__, "rb").read(), np.uint8).astype(np.int32)
    starts = np.random.default_rng(0).integers(0, len(text) - LENGTH, (STEPS, 4))
    return [jnp.asarray(np.stack([text[i : i + LENGTH] for i in of_batch])) for of_batch in starts]


def before(model):
    """Computes the gradients of all weights, and then calls the optimizer."""
    optimizer = nnx.Optimizer(model, adalomo(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        loss, grads = nnx.value_and_grad(loss_fn)(model, tokens)
        optimizer.update(model, grads)
        return loss

    return [float(step(model, optimizer, tokens)) for tokens in batches()]


def after(model):
    """The optimizer takes the loss. It stacks the layers in the first step, and gives them back after the last."""
    optimizer = FusedOptimizer(model, adalomo(1e-2), loss_fn, batches()[0], roll=True)
    losses = [float(optimizer.step(model, tokens).loss) for tokens in batches()]
    optimizer.unplace(model)
    return losses


def main():
    models = [qwen3.Qwen3(CONFIG, rngs=nnx.Rngs(0)) for _ in range(2)]
    losses = [before(models[0]), after(models[1])]
    for step, (plain, fused) in enumerate(zip(*losses)):
        print(f"step {step}: loss {plain:.4f} by nnx.Optimizer, {fused:.4f} by FusedOptimizer")
    np.testing.assert_allclose(*losses, rtol=1e-3)
    weights = [jax.tree.leaves(nnx.state(model, nnx.Param)) for model in models]
    assert losses[1][-1] < losses[1][0] and len(weights[0]) == len(weights[1])


if __name__ == "__main__":
    main()
