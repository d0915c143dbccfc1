"""The compiled programs of a run and the arrays they start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from adalomo_jax import FusedStep, fuse
from adalomo_jax.finetune.config import FinetuneConfig
from adalomo_jax.finetune.optimizer import make_optimizer, make_schedule
from adalomo_jax.memory.compile import shard_bytes, shares_of
from adalomo_jax.models import PRESETS, Llama, LlamaConfig, batch_sharding, next_token_loss, param_shardings
from adalomo_jax.models.attention import Kind, kind_for

Offload = Literal["params", "activations"]


class Program(NamedTuple):
    """What a training loop needs. ``step`` donates the parameters and the optimizer state that it is given."""

    config: LlamaConfig
    params: Any
    """A nested dictionary of arrays."""
    state: Any
    step: Callable[..., Any]
    """``step(params, state, tokens_BT)``, compiled; the result has params, state, loss and metrics."""
    evaluate: Callable[..., jax.Array]
    """``evaluate(params, tokens_NBT)``: the mean loss in nats a token."""
    batch_sharding: NamedSharding | None
    """Of the tokens that ``step`` takes; None on one device."""
    learning_rates: np.ndarray
    """Of each step."""
    attention: Kind
    gradient_bytes: int
    """Most bytes of gradients that are alive at once on a device."""
    compiled_bytes: int | None
    """Arguments, outputs and temporaries of the compiled step; None where the backend does not say."""


class Training(NamedTuple):
    """A run's step before it is compiled, for arrays or shapes."""

    make_params: Callable[[], Any]
    """Random weights, as a nested dictionary; ``nnx.merge(graphdef, params)`` is the model."""
    graphdef: Any
    loss_fn: Callable[..., jax.Array]
    """``loss_fn(params, tokens_BT)``: nats a token."""
    step: FusedStep
    tokens: jax.ShapeDtypeStruct
    """A batch, ``[batch_size, seq_len]``."""
    schedule: optax.Schedule


def make_training(
    config: FinetuneConfig,
    model: LlamaConfig,
    batch_sharding: NamedSharding | None = None,
    *,
    platform: str,
    offload: Offload | None = None,
) -> Training:
    """The step that the options make, of a model of these sizes. Computes nothing.

    On a mesh the step takes parameters and batches that are sharded over it; the latter's sharding is given. The
    platform is that of the devices to compile for. What is offloaded is for ``step.place`` to put into host memory.
    """
    attention = attention_of(config, model, platform)

    def make_model() -> Llama:
        dtype = jnp.dtype(config.dtype)
        return Llama(model, rngs=nnx.Rngs(config.seed), dtype=dtype, attention=attention, batch_sharding=batch_sharding)

    graphdef = nnx.graphdef(nnx.eval_shape(make_model))
    schedule = make_schedule(config)

    def loss_fn(params, tokens_BT):
        return next_token_loss(nnx.merge(graphdef, params), tokens_BT)

    return Training(
        make_params=lambda: nnx.to_pure_dict(nnx.state(make_model(), nnx.Param)),
        graphdef=graphdef,
        loss_fn=loss_fn,
        step=fuse(
            loss_fn,
            make_optimizer(config, schedule),
            microbatches=config.microbatches if config.microbatches > 1 else None,
            seed=config.seed,
            offload=offload,
        ),
        tokens=jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32, sharding=batch_sharding),
        schedule=schedule,
    )


def attention_of(config: FinetuneConfig, model: LlamaConfig, platform: str) -> Kind:
    """The option, or what suits the platform."""
    if config.attention != "auto":
        return config.attention
    return kind_for(platform, config.seq_len, model.head_dim, jnp.dtype(config.dtype))


def build_program(config: FinetuneConfig, mesh: Mesh | None = None) -> Program:
    """Random weights, a fresh optimizer state, and the step, compiled once; on a mesh all spread over it."""
    model, platform = PRESETS[config.model], jax.default_backend()
    of_batch = None if mesh is None else batch_sharding(mesh)
    make_params, _, loss_fn, step, tokens, schedule = make_training(config, model, of_batch, platform=platform)
    of_params = None if mesh is None else param_shardings(jax.eval_shape(make_params), mesh)
    params = jax.jit(make_params, out_shardings=of_params)()
    state = step.init(params, tokens)
    jitted = step.jit if config.fused else jax.jit(step.unfused, donate_argnums=(0, 1))
    compiled = jitted.lower(params, state, tokens).compile()
    return Program(
        config=model,
        params=params,
        state=state,
        step=compiled,
        evaluate=jax.jit(lambda params, tokens: jnp.mean(jax.lax.map(lambda t: loss_fn(params, t), tokens))),
        batch_sharding=of_batch,
        learning_rates=np.asarray(jax.vmap(schedule)(jnp.arange(config.steps))),
        attention=attention_of(config, model, platform),
        gradient_bytes=shares_of(step, params, state, (tokens,), config.fused).gradient,
        compiled_bytes=_compiled_bytes(compiled),
    )


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays on one device."""
    return sum(map(shard_bytes, jax.tree.leaves(tree)))


def _compiled_bytes(compiled: Any) -> int | None:
    sizes = compiled.memory_analysis()
    if sizes is None:
        return None
    new_outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + new_outputs + sizes.temp_size_in_bytes
