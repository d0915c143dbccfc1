"""Finds the parameters of a list of layers that a step keeps stacked: the layers repeat, and are updated alike."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adalomo_jax.fused.offload import shapes_on_device
from adalomo_jax.fused.options import Options
from adalomo_jax.fused.plan.differences import Leaf
from adalomo_jax.fused.plan.jaxpr import Program, is_checkpoint, trace
from adalomo_jax.fused.plan.leafwise import rules_of_leaves
from adalomo_jax.fused.plan.lists import Lists, why_not_stacked
from adalomo_jax.fused.plan.order import with_layers_as_inputs
from adalomo_jax.fused.plan.paths import path_name
from adalomo_jax.fused.plan.placed_tree import layers_of, unstack_layers
from adalomo_jax.fused.plan.repeats import Repeat, find_repeats
from adalomo_jax.fused.plan.selection import trained_leaves
from adalomo_jax.fused.sharding import Sharding, sharding_of
from adalomo_jax.optimizers.choice import is_bool
from adalomo_jax.optimizers.kept import form_of, is_kept
from adalomo_jax.optimizers.per_layer import ExtraArgumentMissing, Group, PerLayer

FEWEST_WITHOUT_CHECKPOINTS = 6
"""The fewest layers that are stacked if they save more than their inputs. Unrolled, XLA saves less of each layer than a
scan does. From here on, the gradients that a stack spares outweigh that (tests/fused/benchmark_few_layers.py)."""


def find_stacks(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformationExtraArgs,
    options: Options,
    params: Any,
    args: Sequence[Any],
    extra_args: Mapping[str, Any],
) -> list[tuple[int, ...]]:
    """For each stack, the positions of its layers among the parameters, in the order in which the loss reads them.

    Layers share a stack only if they are trained alike, are spread over devices alike, and ``tx`` has the same rule
    for each: if a mask or a label names one of them, that one stays by itself.
    """
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_kept)
    trained = trained_leaves(params, options.trainable)
    program, _ = trace(lambda leaves, *args: loss_fn(treedef.unflatten(leaves), *args), shapes_on_device(leaves), *args)
    of_params = program.inputs[: len(leaves)]
    if not any(_are_enough(repeat, options.roll) for repeat in find_repeats(program, of_params, trained).repeats):
        return []  # as in most models: tx need not be asked
    rules = _rules(tx, treedef, [program.avals[v] for v in of_params], trained, extra_args)
    kinds = list(zip(trained, rules, map(str, map(sharding_of, leaves)), map(form_of, leaves), strict=True))
    found = find_repeats(program, of_params, kinds)
    repeats = [repeat for repeat in found.repeats if _are_enough(repeat, options.roll)]
    position = {v: i for i, v in enumerate(of_params)}
    scanned = [scanned.values for repeat in repeats for scanned in repeat.scanned]
    return [tuple(position[v] for v in values) for values in scanned if all(v in position for v in values)]


def lists_of(
    tx: optax.GradientTransformationExtraArgs,
    options: Options,
    program: Program,
    treedef: Any,
    shardings: Sequence[Sharding],
    forms: Sequence[str],
    extra_args: Mapping[str, Any],
) -> Lists:
    """What is known about a loss's lists of layers: what could be stacked but is not, and why other leaves are not.

    Args:
      tx: the optimizer.
      options: the options of the step.
      program: the loss, with nothing rolled up yet.
      treedef: the structure of its parameters, placed or not.
      shardings: the sharding of each parameter.
      forms: the form in which each parameter is kept.
      extra_args: the extra arguments of ``tx.update`` that are known.
    """
    types = [program.avals[v] for v in program.inputs[: len(shardings)]]
    shape = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = treedef.unflatten(list(map(shape, types, shardings)))
    positions, unplaced = layers_of(params), unstack_layers(params)
    layers = [len(of_stack) if len(of_stack) > 1 else None for of_stack in positions]
    program, inputs = with_layers_as_inputs(program, layers)
    order = [k for k, _ in sorted(enumerate(i for of_stack in positions for i in of_stack), key=lambda pair: pair[1])]
    values = [inputs[k] for k in order]
    trained = trained_leaves(unplaced, options.trainable)
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(unplaced)
    try:
        rules = _rules(tx, treedef, [leaf for _, leaf in paths_and_leaves], trained, extra_args)
    except ExtraArgumentMissing:  # they may not be known before a step: then the rules of `tx` are not told apart
        rules = [None] * len(values)
    form_at = {i: form for of_stack, form in zip(positions, forms, strict=True) for i in of_stack}
    leaves = [
        Leaf(path_name(path), v, program.avals[v].str_short(), is_trained, rule, str(sharding_of(x)), form_at[i])
        for i, ((path, x), v, is_trained, rule) in enumerate(zip(paths_and_leaves, values, trained, rules, strict=True))
    ]
    found = find_repeats(program, values, [leaf.kind for leaf in leaves])
    stacked = {i for of_stack in positions if len(of_stack) > 1 for i in of_stack}
    reasons = why_not_stacked(found, leaves, stacked)
    numbers = {leaf.value for i, leaf in enumerate(leaves) if i not in stacked}
    repeats = [repeat for repeat in found.repeats if any(numbers.issuperset(s.values) for s in repeat.scanned)]
    enough = [repeat for repeat in repeats if _are_enough(repeat, options.roll)]
    too_few = [repeat for repeat in repeats if repeat not in enough]
    return Lists(enough, too_few, [reasons[of_stack[0]] for of_stack in positions])


def _are_enough(repeat: Repeat, roll: bool | int) -> bool:
    """Whether this many layers are stacked: if that takes less memory, or if the user's minimum is reached."""
    if not is_bool(roll):
        return repeat.layers >= roll
    own = {scanned.received for scanned in repeat.scanned if scanned.is_parameter}
    unchecked = any(own.intersection(equation.inputs) for equation in repeat.layer if not is_checkpoint(equation))
    return repeat.layers >= FEWEST_WITHOUT_CHECKPOINTS or not unchecked


def _rules(
    tx: optax.GradientTransformationExtraArgs,
    treedef: Any,
    avals: Sequence[Any],
    trained: Sequence[bool],
    extra_args: Mapping[str, Any],
) -> list[Any]:
    """What ``tx`` does with each parameter; equal for those that it treats alike."""
    tensors = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals)
    group = Group(tuple(i for i, is_trained in enumerate(trained) if is_trained), None)
    loss = jax.ShapeDtypeStruct((), jnp.float32)
    rules = rules_of_leaves(PerLayer(tx, treedef, tensors, (group,)), {"value": loss, **extra_args})
    return [rules.get(i) for i in range(len(trained))]
