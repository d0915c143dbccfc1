"""A model's training in plain Optax, with its layers as separate leaves. It shares nothing with the engine."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from language_model import layer, normalize


def unstack(params):
    """Turns the stacks, which are named ``layers...``, into lists of layers."""
    at = lambda stack, i: jax.tree.map(lambda x: x[i], stack)
    split = lambda stack: [at(stack, i) for i in range(len(jax.tree.leaves(stack)[0]))]
    return {name: split(p) if name.startswith("layers") else p for name, p in params.items()}


def stack(params):
    """Turns the lists of layers into stacks."""
    join = lambda layers: jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    return {name: join(p) if name.startswith("layers") else p for name, p in params.items()}


def train(loss_fn, tx, params, batches) -> tuple[Any, Any, list[float]]:
    """The stacked parameters, the state after one step on each batch, and the gradient norms."""
    apart = unstack(params)
    state, norms = tx.init(apart), []

    @jax.jit
    def step(apart, state, args):
        grads = jax.grad(lambda p: loss_fn(stack(p), *args))(apart)
        updates, state = tx.update(grads, state, apart)
        return optax.apply_updates(apart, updates), state, optax.tree.norm(grads)

    for args in batches:
        apart, state, norm = step(apart, state, args)
        norms.append(float(norm))
    return stack(apart), state, norms


def unrolled_loss(params, tokens):
    """The loss of the language model, with its layers in a Python list, each under a checkpoint."""
    x = params["embed"][tokens]
    for w in params["layers0"]:
        x = jax.checkpoint(layer)(x, w)
    log_p = jax.nn.log_softmax(normalize(x, params["norm"]) @ params["head"])
    return -jnp.mean(jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1))


def run_fused(step, params, batches):
    """The results of one step on each batch; each step continues from the results of the one before."""
    now, results = (params, step.init(params, *batches[0])), []
    jitted = jax.jit(step)
    for args in batches:
        results.append(jitted(*now, *args))
        now = results[-1][:2]
    return results


def norms_of(results):
    return np.asarray([result.metrics["grad_norm"] for result in results])
