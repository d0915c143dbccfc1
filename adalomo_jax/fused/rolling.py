"""Which parameters of a list of layers a step keeps stacked: those of layers that repeat, and are updated alike."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adalomo_jax.fused.checks import trained_leaves
from adalomo_jax.fused.jaxpr import trace
from adalomo_jax.fused.leafwise import rules_of_leaves
from adalomo_jax.fused.offload import shapes_on_device
from adalomo_jax.fused.options import Options
from adalomo_jax.fused.repeats import find_repeats
from adalomo_jax.fused.sharding import sharding_of
from adalomo_jax.optimizers.per_layer import Group, PerLayer


def find_stacks(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformationExtraArgs,
    options: Options,
    params: Any,
    args: Sequence[Any],
    extra_args: Mapping[str, Any],
) -> list[tuple[int, ...]]:
    """Of each stack the positions of its layers among the parameters, in the order in which the loss reads them.

    Layers are of one stack only if they are trained alike, spread over devices alike, and if ``tx`` has the same rule
    for each: where a mask or a label names one of them, that one stays by itself.
    """
    leaves, treedef = jax.tree.flatten(params)
    trained = trained_leaves(params, options.trainable)
    program, _ = trace(lambda leaves, *args: loss_fn(treedef.unflatten(leaves), *args), shapes_on_device(leaves), *args)
    of_params = program.inputs[: len(leaves)]
    if not find_repeats(program, of_params, trained).repeats:
        return []  # as most models: then tx need not be asked
    rules = _rules(tx, treedef, [program.avals[v] for v in of_params], trained, extra_args)
    kinds = list(zip(trained, rules, map(str, map(sharding_of, leaves)), strict=True))
    repeats = find_repeats(program, of_params, kinds).repeats
    position = {v: i for i, v in enumerate(of_params)}
    scanned = [scanned.values for repeat in repeats for scanned in repeat.scanned]
    return [tuple(position[v] for v in values) for values in scanned if all(v in position for v in values)]


def _rules(
    tx: optax.GradientTransformationExtraArgs,
    treedef: Any,
    avals: Sequence[Any],
    trained: Sequence[bool],
    extra_args: Mapping[str, Any],
) -> list[Any]:
    """Of each parameter what ``tx`` does with it; equal for those that it treats alike."""
    tensors = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals)
    group = Group(tuple(i for i, is_trained in enumerate(trained) if is_trained), None)
    loss = jax.ShapeDtypeStruct((), jnp.float32)
    rules = rules_of_leaves(PerLayer(tx, treedef, tensors, (group,)), {"value": loss, **extra_args})
    return [rules.get(i) for i in range(len(trained))]
