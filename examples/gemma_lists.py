"""Trains DeepMind's unmodified Gemma 3: ``step.place`` stacks its list of layers; results equal the list's.

    pip install gemma 'adalomo-jax[tpu-aot]'
    python examples/gemma_lists.py            # a small model, compared with plain Optax
    python examples/gemma_lists.py tpu-v5e    # the memory that four billion parameters take, by a compiler

The example needs only what ``gemma.gm.nn`` imports: etils, kauldron, sentencepiece. The package has no remat of its
own; the line that sets ``Block`` puts remat around each layer.
"""

import dataclasses
import json
import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from gemma.gm.nn import _config, _gemma, _modules  # pyright: ignore[reportMissingImports]

from adalomo_jax import adalomo, fuse
from adalomo_jax.memory import TARGETS, compile_usage

_modules.Block = nn.remat(_modules.Block)
LENGTH, CHUNKS = 2048, 8
SMALL = dict(num_embed=64, embed_dim=16, hidden_dim=32, num_heads=4, head_dim=8, num_kv_heads=2, sliding_window_size=4)


def loss_of(model):
    """The mean cross-entropy of the next token, with the logits in chunks."""

    def loss_fn(params, tokens):
        hidden = model.apply({"params": params}, tokens, return_hidden_states=True).hidden_states
        embedding, targets = params["embedder"]["input_embedding"], jnp.roll(tokens, -1, 1)

        @jax.checkpoint
        def chunk(total, x_and_targets):
            x, targets = x_and_targets
            logits = (x @ embedding.T).astype(jnp.float32)
            is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
            picked = jnp.sum(jnp.where(is_target, logits, 0.0), -1)
            return total + jnp.sum(jax.nn.logsumexp(logits, -1) - picked), None

        chunks = lambda x: x.reshape(x.shape[0], CHUNKS, -1, *x.shape[2:]).swapaxes(0, 1)
        total, _ = jax.lax.scan(chunk, jnp.float32(0), (chunks(hidden), chunks(targets)))
        return total / tokens.size

    return loss_fn


def train(layers=8, steps=5):
    """Trains a small model twice, with its layers stacked and in a list, and compares the weights."""
    pattern = _config.make_attention_layers_types(_gemma.GEMMA3_ATTENTION_PATTERN, num_layers=layers)
    config = dataclasses.replace(_gemma.Gemma3_4B.config, attention_types=pattern, vision_encoder=None, **SMALL)
    model, tokens = (
        _gemma.Gemma3_4B(config=config, dtype=jnp.float32),
        jax.random.randint(jax.random.key(0), (2, 16), 0, 64),
    )
    params, loss_fn = model.init(jax.random.key(1), tokens)["params"], loss_of(model)
    step, tx = fuse(loss_fn, adalomo(1e-2)), adalomo(1e-2)
    placed = step.place(jax.tree.map(jnp.copy, params), tokens)
    print(step.plan(placed, tokens))
    state, of_optax = step.init(placed, tokens), tx.init(params)

    @jax.jit
    def by_optax(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params, tokens), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        placed, state, *_ = step.jit(placed, state, tokens)
        params, of_optax = by_optax(params, of_optax)
    relative = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    assert max(jax.tree.leaves(jax.tree.map(relative, step.unplace(placed), params))) < 1e-5


def measure(target, step):
    """The memory that one step of Gemma 3 4B needs, in bfloat16, with 1 x 2048 tokens."""
    model, tokens = _gemma.Gemma3_4B(text_only=True), jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    fused = fuse(loss_of(model), adalomo(1e-3))
    if step == "stacked":
        params = fused.place(params, tokens)
    usage = compile_usage(fused, params, tokens, target=TARGETS[target], fused=step != "unfused")
    row = {"model": "gemma3-4b", "package": "gemma", "target": target, "layers": 34, "step": step}
    row |= {"lines_changed": 2 * (step == "stacked"), "weights_gb": round(usage.params_bytes / 1e9, 2)}
    return row | {"peak_gb": round(usage.peak_bytes / 1e9, 2), "compile_seconds": round(usage.compile_seconds)}


if __name__ == "__main__":
    for target in sys.argv[1:]:
        for step in ("stacked", "unfused"):
            print(json.dumps(measure(target, step)), flush=True)
    if not sys.argv[1:]:
        train()
