"""Compiled training steps of a Llama with random weights, to be timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from adalomo_jax import fuse
from adalomo_jax.bench.contestants import Contestant
from adalomo_jax.memory.usage import peak_of
from adalomo_jax.models import Decoder, DecoderConfig, next_token_loss
from adalomo_jax.models.attention import kind_for
from adalomo_jax.models.weights import kept, make_kept
from adalomo_jax.rules import RULES
from adalomo_jax.training.memory_use import release_freed_memory

_RATE = 1e-4
"""The learning rate. It keeps a random model finite."""


class Compiled(NamedTuple):
    """A step, compiled, and its arguments in place."""

    step: Callable[[], float]
    """Takes a step, waits until it is done, and returns its seconds."""
    compile_seconds: float
    """Seconds to trace and to compile."""
    memory: dict[str, int] | None
    """Bytes that the compiler reports; ``peak`` is arguments, outputs that are not among them, and temporaries."""
    params: int
    """Number of weights."""


def compile_step(contestant: Contestant, model: DecoderConfig, batch_size: int, seq_len: int, dtype: str) -> Compiled:
    """The contestant's step on one batch of random tokens."""
    kind = kind_for(jax.default_backend(), seq_len, model.head_dim, jnp.dtype(dtype), model.attention_softcap)
    make_model = lambda: Decoder(model, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), attention=kind)
    graphdef = nnx.graphdef(nnx.eval_shape(make_model))
    tokens = jax.random.randint(jax.random.key(1), (batch_size, seq_len), 0, model.vocab_size)
    loss_fn = lambda params, tokens: next_token_loss(nnx.merge(graphdef, params), tokens)
    make_params = lambda: nnx.to_pure_dict(nnx.state(make_model(), nnx.Param))
    floats = jax.eval_shape(make_params)
    shapes = kept(floats, contestant.weights)
    jitted, make_first, is_next = _step_of(contestant, loss_fn, tokens)
    count = sum(x.size for x in jax.tree.leaves(floats))
    # Compile before the weights exist, so that the compiler's memory does not come on top of theirs.
    began = time.perf_counter()
    compiled = jitted.lower(*jax.eval_shape(make_first, shapes), tokens).compile()
    seconds = time.perf_counter() - began
    release_freed_memory()
    now = [make_first(make_kept(make_params, contestant.weights))]
    release_freed_memory()

    def step() -> float:
        began = time.perf_counter()
        result = jax.block_until_ready(compiled(*now[0], tokens))
        seconds = time.perf_counter() - began
        now[0] = is_next(now[0], result)
        return seconds

    return Compiled(step, seconds, _memory_of(compiled), count)


def _step_of(contestant: Contestant, loss_fn: Callable, tokens: jax.Array) -> tuple[Any, Callable, Callable]:
    """The jitted step, a function from weights to its first arguments, and one from a result to the next arguments.

    These are the arguments before the last one, the tokens.
    """
    gradient = jax.value_and_grad(loss_fn)
    if contestant.how == "gradients":
        return jax.jit(gradient), lambda params: (params,), lambda now, result: now
    if contestant.how == "gradients in place":
        into = jax.jit(lambda params, old, tokens: gradient(params, tokens), donate_argnums=1, keep_unused=True)
        with_old = lambda params: (params, jax.tree.map(jnp.zeros_like, params))
        return into, with_old, lambda now, result: (now[0], result[1])
    tx = RULES[contestant.optimizer].make(_RATE) if contestant.optimizer else optax.sgd(_RATE)
    if contestant.how == "optax":

        def plain(params, state, tokens):
            loss, grads = gradient(params, tokens)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        with_state = lambda params: (params, tx.init(params))
        return jax.jit(plain, donate_argnums=(0, 1)), with_state, lambda now, result: result[:2]
    fused = fuse(
        loss_fn,
        tx,
        max_grad_norm=contestant.max_grad_norm,
        microbatches=contestant.microbatches,
        stochastic_rounding=contestant.stochastic_rounding,
    )
    jitted = fused.jit if contestant.how == "fused" else jax.jit(fused.unfused, donate_argnums=(0, 1))
    with_state = lambda params: (params, fused.init(params, tokens))
    return jitted, with_state, lambda now, result: (result.params, result.state)


def _memory_of(compiled: Any) -> dict[str, int] | None:
    sizes = compiled.memory_analysis()
    if sizes is None:
        return None
    found = {name: getattr(sizes, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}
    return found | {"peak": peak_of(sizes)}
