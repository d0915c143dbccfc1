"""The compiled programs of a run and the arrays they start from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from adalomo_jax import FusedStep, fuse
from adalomo_jax.inputs import InputError, one_line
from adalomo_jax.memory.compile import shard_bytes, shares_of
from adalomo_jax.memory.usage import peak_of
from adalomo_jax.models import (
    Decoder,
    DecoderConfig,
    batch_sharding,
    count_targets,
    next_token_loss,
    param_shardings,
)
from adalomo_jax.models.attention import Kind, kind_for, splash_takes
from adalomo_jax.models.sharding import everywhere
from adalomo_jax.models.weights import Weights, kept, make_kept
from adalomo_jax.pretrained.by_name import Pretrained
from adalomo_jax.pretrained.load import load_params
from adalomo_jax.rules import RULES
from adalomo_jax.text.packing import Batch
from adalomo_jax.training.config import FinetuneConfig
from adalomo_jax.training.memory_use import release_freed_memory
from adalomo_jax.training.schedule import make_schedule

Offload = Literal["params", "activations"]


class Program(NamedTuple):
    """What a training loop needs. ``step`` donates the parameters and the optimizer state that it is given."""

    params: Any
    """A nested dictionary of arrays."""
    state: Any
    step: Callable[[Any, Any, Batch], Any]
    """``step(params, state, batch)``, compiled; the result has params, state, loss and metrics."""
    evaluate: Callable[[Any, Batch], jax.Array]
    """``evaluate(params, batches)``: the mean loss in nats a token of batches stacked on a new first axis."""
    batch_sharding: NamedSharding | None
    """The sharding of the batches that ``step`` takes; None on one device."""
    learning_rate: Callable[[int], float]
    """The learning rate of a step, from 1."""
    attention: Kind
    gradient_bytes: int
    """Most bytes of gradients that are alive at once on a device."""
    compiled_bytes: int | None
    """Arguments, outputs and temporaries of the compiled step; None if the backend does not say."""


class Training(NamedTuple):
    """A run's step before it is compiled, for arrays or shapes."""

    make_params: Callable[[], Any]
    """Random weights, as a nested dictionary of floats; ``nnx.merge(graphdef, params)`` is the model."""
    weights: Weights | None
    """The form in which the step takes the matrices of layers."""
    graphdef: Any
    step: FusedStep
    args: tuple[Batch, jax.ShapeDtypeStruct]
    """The arguments of ``step`` after parameters and state: a batch, and how many tokens it predicts."""
    evaluate: Callable[[Any, Batch], jax.Array]
    """``evaluate(params, batches)``: the mean loss in nats a token of batches stacked on a new first axis. What the
    step computes has the routers' loss besides."""
    schedule: optax.Schedule


def make_training(
    config: FinetuneConfig,
    model: DecoderConfig,
    batch_sharding: NamedSharding | None = None,
    *,
    platform: str,
    offload: Offload | None = None,
    schedule: optax.Schedule | None = None,
) -> Training:
    """The training step of the options, for a model of these sizes. Computes nothing.

    On a mesh the step takes parameters and batches that are sharded over it; the batches' sharding is given. The
    platform is that of the devices to compile for. ``step.place`` puts what is offloaded into host memory.
    A given schedule replaces the options' own.
    """
    attention = attention_of(config, model, platform)

    def make_model() -> Decoder:
        dtype = jnp.dtype(config.dtype)
        return Decoder(
            model, rngs=nnx.Rngs(config.seed), dtype=dtype, attention=attention, batch_sharding=batch_sharding
        )

    graphdef = nnx.graphdef(nnx.eval_shape(make_model))
    schedule = schedule or make_schedule(config)

    def loss_fn(params, batch: Batch, count, router_loss: float = 0.0):
        decoder: Decoder = nnx.merge(graphdef, params)
        of_text = batch.tokens_BT, batch.learned_BT, batch.segments_BT
        return next_token_loss(decoder, *of_text, count=count, router_loss=router_loss)

    router_loss = model.router_aux_loss_coef if config.router_loss is None else config.router_loss
    rule = RULES[config.optimizer].make(schedule, config.weight_decay)
    # The loss itself would have XLA lay out stacks of kept weights anew, which takes as much memory again on a TPU.
    forward_loss = loss_fn if config.weights is None else fuse(loss_fn, rule).loss

    def evaluate(params, batches: Batch):
        total = _count(jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batches))
        return jnp.sum(jax.lax.map(lambda batch: forward_loss(params, batch, total), batches))

    # The mean is over the tokens of the whole batch. Its parts have more or fewer tokens, so they are summed.
    parts = config.microbatches if config.microbatches > 1 else None
    return Training(
        make_params=lambda: nnx.to_pure_dict(nnx.state(make_model(), nnx.Param)),
        weights=config.weights,
        graphdef=graphdef,
        step=fuse(
            partial(loss_fn, router_loss=router_loss),
            rule,
            max_grad_norm=config.max_grad_norm,
            microbatches=parts,
            reduction="sum",
            batch_argnums=None if parts is None else 1,
            stochastic_rounding=None if config.stochastic_rounding else False,
            seed=config.seed,
            offload=offload,
            rms_metrics=platform != "tpu" if config.update_rms is None else config.update_rms,
        ),
        args=_abstract_args(config, batch_sharding),
        evaluate=evaluate,
        schedule=schedule,
    )


def _abstract_args(config: FinetuneConfig, sharding: NamedSharding | None) -> tuple[Batch, jax.ShapeDtypeStruct]:
    shape = (config.batch_size, config.seq_len)
    of = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    of_count = None if sharding is None else everywhere(sharding.mesh)
    return Batch(of(jnp.int32), of(jnp.int32), of(jnp.bool_)), jax.ShapeDtypeStruct((), jnp.float32, sharding=of_count)


def attention_of(config: FinetuneConfig, model: DecoderConfig, platform: str) -> Kind:
    """The option, or the kind that suits the platform."""
    if config.attention != "auto":
        return config.attention
    return kind_for(platform, config.seq_len, model.head_dim, jnp.dtype(config.dtype), model.attention_softcap)


def check_attention(config: FinetuneConfig, model: DecoderConfig, platform: str) -> None:
    """Raise InputError for a kernel that this machine, or such a model, does not have."""
    due = {"splash": ("a TPU", ("tpu",)), "cudnn": ("an NVIDIA GPU", ("gpu", "cuda"))}
    if config.attention in due and platform not in due[config.attention][1]:
        raise InputError(
            f"--attention {config.attention} needs {due[config.attention][0]}, and this is a {platform}; leave it out"
        )
    if config.attention == "cudnn" and model.attention_softcap is not None:
        raise InputError(f"--attention cudnn takes no capped scores, and {config.model} has them; leave it out")
    if config.attention == "splash" and not splash_takes(config.seq_len, model.head_dim):
        raise InputError(
            f"--attention splash takes a --seq-len that is a multiple of 128 and heads 128 wide, got {config.seq_len} "
            f"and {model.head_dim}; leave it out"
        )


def build_program(
    config: FinetuneConfig,
    model: Pretrained,
    mesh: Mesh | None = None,
    restore: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    *,
    schedule: optax.Schedule | None = None,
) -> Program:
    """The weights to start from, a fresh optimizer state, and the step, compiled once; on a mesh all spread over it.

    If ``restore`` is given, it turns the shapes of parameters and state, with their shardings, into the arrays to
    continue from, and no other arrays are made. See `make_training` for the schedule.
    """
    platform = jax.default_backend()
    of_batch = None if mesh is None else batch_sharding(mesh)
    training = make_training(config, model.config, of_batch, platform=platform, schedule=schedule)
    step, args = training.step, training.args
    if restore is None:
        params = _first_params(config, model, training, mesh)
        state = step.init(params, *args)
    else:
        params, state = restore(*abstract_arrays(training, mesh))
    jitted = step.jit if config.fused else jax.jit(step.unfused, donate_argnums=(0, 1))
    compiled = jitted.lower(params, state, *args).compile()
    release_freed_memory()
    count, schedule = jax.jit(_count, out_shardings=args[1].sharding), jax.jit(training.schedule)

    return Program(
        params=params,
        state=state,
        step=lambda params, state, batch: compiled(params, state, batch, count(batch)),
        evaluate=jax.jit(training.evaluate),
        batch_sharding=of_batch,
        learning_rate=lambda step: float(schedule(step - 1)),
        attention=attention_of(config, model.config, platform),
        gradient_bytes=shares_of(step, params, state, args, config.fused).gradient,
        compiled_bytes=_compiled_bytes(compiled),
    )


def _first_params(config: FinetuneConfig, model: Pretrained, training: Training, mesh: Mesh | None) -> Any:
    shardings = None if mesh is None else param_shardings(jax.eval_shape(training.make_params), mesh)
    if model.checkpoint is None:
        if config.weights is not None:
            return make_kept(training.make_params, config.weights, shardings)
        # If there is no memory for them, this raises. To ask for the address of such an array would wait for ever.
        return jax.block_until_ready(jax.jit(training.make_params, out_shardings=shardings)())
    try:
        return load_params(model.config, model.checkpoint.source, config.dtype, shardings, config.weights)
    except ValueError as error:
        raise InputError(f"--model {config.model}: {one_line(error)}") from None


def abstract_arrays(training: Training, mesh: Mesh | None) -> tuple[Any, Any]:
    """Parameters and optimizer state as ``jax.ShapeDtypeStruct``s, on a mesh with their shardings."""
    params = abstract_params(training, mesh)
    return params, training.step.abstract_state(params, *training.args)


def abstract_params(training: Training, mesh: Mesh | None) -> Any:
    """The parameters alone; see `abstract_arrays`."""
    params = jax.eval_shape(training.make_params)
    if mesh is not None:
        params = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), params, param_shardings(params, mesh))
    return kept(params, training.weights)


def _count(batch: Batch) -> jax.Array:
    return count_targets(jnp.asarray(batch.learned_BT), jnp.asarray(batch.segments_BT))


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays on one device."""
    return sum(map(shard_bytes, jax.tree.leaves(tree)))


def _compiled_bytes(compiled: Any) -> int | None:
    sizes = compiled.memory_analysis()
    return None if sizes is None else peak_of(sizes)
