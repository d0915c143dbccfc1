"""The state of a training step, as it is before the first step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from adalomo_jax.fused.buffers import with_own_memory
from adalomo_jax.fused.loss_scale import DynamicLossScale, LossScaleState
from adalomo_jax.fused.offload import is_on_host, shapes_on_device
from adalomo_jax.fused.plan.call_signature import Signature
from adalomo_jax.fused.plan.tracing import Traced
from adalomo_jax.fused.sharding import of_own_state, of_stack
from adalomo_jax.optimizers.kept import as_floats, is_kept

LossScale = float | DynamicLossScale | None


class FusedState(NamedTuple):
    """The state of a training step."""

    count: jax.Array
    """Steps taken, int32; the keys of stochastic rounding are made from it."""
    skipped: jax.Array
    """Steps in which something was not finite, so that it, or everything, was not written; int32."""
    inner: Any
    """The state of ``tx``; what it keeps for a stack of layers has a leading layer axis."""
    loss_scale: Any
    """The state of a dynamic loss scale; None without one."""
    signature: Signature
    """What the state was made for, no array. For `flax.serialization` import `adalomo_jax.linen`, to register it."""


def make_state(traced: Traced, loss_scale: LossScale) -> FusedState:
    """The state for parameters that are arrays or shapes; it is sharded as they are."""
    leaves = shapes_on_device(traced.leaves)
    is_shape = lambda x: any(isinstance(part, jax.ShapeDtypeStruct) for part in jax.tree.leaves(x))
    arrays = {i: x for i, x in enumerate(traced.leaves) if not (is_on_host(x) or is_shape(x))}
    make = lambda arrays: _make(traced, [as_floats(arrays.get(i, x)) for i, x in enumerate(leaves)], loss_scale)
    spread = any(traced.signature.shardings)
    if spread:
        make = jax.jit(make, out_shardings=_shardings(traced, loss_scale))
    elif any(map(is_kept, arrays.values())):
        make = jax.jit(make)  # so only those floats are computed that tx reads
    state = make(arrays)
    # A tx may keep the parameters themselves, or one array twice, but a step takes over the memory of each array.
    made, treedef = jax.tree.flatten(state)
    return treedef.unflatten(with_own_memory(made, jax.tree.leaves(traced.leaves)))


def make_abstract_state(traced: Traced, loss_scale: LossScale) -> FusedState:
    """The shapes and shardings of the state that `make_state` makes."""
    leaves = shapes_on_device(traced.leaves)
    state = jax.eval_shape(lambda leaves: _make(traced, leaves, loss_scale), leaves)
    if not any(traced.signature.shardings):
        return state
    return jax.tree.map(lambda x, s: x.update(sharding=s), state, _shardings(traced, loss_scale))


def _make(traced: Traced, leaves: Sequence[Any], loss_scale: LossScale) -> FusedState:
    return FusedState(
        count=jnp.zeros([], jnp.int32),
        skipped=jnp.zeros([], jnp.int32),
        inner=traced.optimizer.init(leaves, traced.axes),
        loss_scale=loss_scale.init() if isinstance(loss_scale, DynamicLossScale) else None,
        signature=traced.signature,
    )


def _shardings(traced: Traced, loss_scale: LossScale) -> FusedState:
    """The sharding of each array; state of no parameter, or of an unsharded one, is whole on each device."""
    optimizer, mesh = traced.optimizer, next(s.mesh for s in traced.signature.shardings if s is not None)
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    of_tensors = [leaf.tensor_sharding for leaf in traced.plan.leaves]
    owns = []
    for group in optimizer.groups:
        own = [s or everywhere for s in of_own_state(optimizer, group, of_tensors)]
        owns.append(own if group.layers is None else list(map(of_stack, own)))
    return FusedState(
        count=everywhere,
        skipped=everywhere,
        inner=optimizer.assemble([everywhere for _ in optimizer.shared_paths], owns),
        loss_scale=LossScaleState(everywhere, everywhere) if isinstance(loss_scale, DynamicLossScale) else None,
        signature=traced.signature,
    )
