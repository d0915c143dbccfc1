"""Traces and plans a call of the loss, and lifts the optimizer to the plan."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from adalomo_jax.fused.offload import shapes_on_device
from adalomo_jax.fused.options import Options
from adalomo_jax.fused.plan.call_signature import Signature, check_signature, is_for, signature_of
from adalomo_jax.fused.plan.checks import (
    check_args,
    check_batch,
    check_blocks,
    check_loss,
    check_program,
    check_returned,
    check_strict,
)
from adalomo_jax.fused.plan.jaxpr import trace
from adalomo_jax.fused.plan.leafwise import check_leafwise
from adalomo_jax.fused.plan.paths import path_name
from adalomo_jax.fused.plan.placed_tree import is_stacked, layer_paths, unstack_layers
from adalomo_jax.fused.plan.plan import Plan
from adalomo_jax.fused.plan.planning import make_plan
from adalomo_jax.fused.plan.readers import fold_readers
from adalomo_jax.fused.plan.reroll import reroll
from adalomo_jax.fused.plan.rolling import lists_of
from adalomo_jax.fused.plan.selection import trained_leaves
from adalomo_jax.fused.sharding import Sharding, constrain, of_stack
from adalomo_jax.jax_versions import explicit_sharding
from adalomo_jax.optimizers.kept import form_of, is_kept
from adalomo_jax.optimizers.per_layer import ExtraArgumentMissing, PerLayer


class Traced(NamedTuple):
    """What is known about a call once the loss has been traced."""

    plan: Plan
    optimizer: PerLayer
    leaves: list[Any]
    """The parameters."""
    treedef: Any
    args: list[Any]
    """The leaves of the loss's other arguments; those that are sliced have a leading microbatch axis."""
    args_treedef: Any
    sliced: tuple[bool, ...]
    """Whether each of `args` is sliced into microbatches."""
    result_treedef: Any
    """The structure of the loss's result."""
    signature: Signature

    @property
    def axes(self) -> tuple[int | None, ...]:
        """The layer axis of each parameter."""
        return tuple(leaf.axis for leaf in self.plan.leaves)


def trace_call(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformationExtraArgs,
    options: Options,
    params: Any,
    args: Sequence[Any],
    made_for: Signature | None = None,
    extra_args: Mapping[str, Any] | None = None,
) -> Traced:
    """Traces ``loss_fn(params, *args)``, for one microbatch if there are several. Computes nothing.

    ``made_for`` is the signature of the state that the call is given: it knows how arrays that may be traced now are
    spread. ``extra_args`` go to ``tx.update`` besides the loss, which is ``value``; None if they are not known yet.
    """
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_kept)
    paths, leaves = [path_name(path) for path, _ in paths_and_leaves], [leaf for _, leaf in paths_and_leaves]
    trained = trained_leaves(params, options.trainable)
    check_args(args)
    check_batch(options, args)
    signature = signature_of(params, args)
    known = made_for if made_for is not None and is_for(made_for, signature) else signature
    flat, args_treedef = jax.tree.flatten(tuple(args))
    sliced = tuple(options.is_batch(position) for position, arg in enumerate(args) for _ in jax.tree.leaves(arg))
    flat = [
        _slices(x, options.microbatches or 1, sharding) if is_sliced else x
        for x, is_sliced, sharding in zip(flat, sliced, known.args_shardings)
    ]
    of_one = [jax.eval_shape(lambda x: x[0], x) if is_sliced else x for x, is_sliced in zip(flat, sliced)]

    def on_leaves(leaves: list[Any], *args: Any) -> Any:
        result = loss_fn(unstack_layers(treedef.unflatten(leaves)), *args)
        check_returned(result)
        return result

    program, result_treedef = trace(on_leaves, shapes_on_device(leaves), *args_treedef.unflatten(of_one))
    as_written = program
    if options.roll or is_stacked(params):
        program = reroll(program, program.inputs[: len(leaves)])
    program = fold_readers(program, program.inputs[: len(leaves)], trained)
    check_loss([program.avals[v] for v in program.outputs], result_treedef, options.has_aux)
    check_program(program, paths, trained)
    if made_for is not None:
        check_signature(made_for, signature)
    of_args = program.inputs[len(leaves) :]
    batched = [v for v, is_sliced in zip(of_args, sliced, strict=True) if is_sliced]
    extra = jax.tree.map(_type, {"value": program.avals[program.outputs[0]], **(extra_args or {})})
    forms = [leaf.name if is_kept(leaf) else "" for leaf in leaves]
    find_lists = partial(lists_of, tx, options, as_written, treedef, known.shardings, list(map(form_of, leaves)), extra)
    plan = make_plan(program, paths, trained, batched, known.shardings, layer_paths(params), forms, find_lists)
    check_blocks(plan, leaves)
    if options.strict:
        check_strict(plan)
    dtypes = [program.avals[v].dtype for v in program.inputs]  # the dtypes of typed PRNG keys have no usable name
    tensors = tuple(jax.ShapeDtypeStruct(leaf.tensor_shape, dtype) for leaf, dtype in zip(plan.leaves, dtypes))
    optimizer = PerLayer(tx, treedef, tensors, plan.groups)
    _prove_leafwise(optimizer, paths, extra, options, extra_args is not None)
    return Traced(plan, optimizer, leaves, treedef, flat, args_treedef, sliced, result_treedef, signature)


def _prove_leafwise(
    optimizer: PerLayer, paths: Sequence[str], extra_args: Any, options: Options, complete: bool
) -> None:
    """Refuses a ``tx`` that mixes leaves; proves each case once. Before a step, extra arguments may be missing."""
    types, structure = jax.tree.flatten(extra_args)
    case = (optimizer.treedef, optimizer.tensors, optimizer.groups, options.offloads_params, tuple(types), structure)
    proven = _proven_cases(optimizer.tx)
    if case in proven:
        return
    try:
        check_leafwise(optimizer, paths, extra_args, one_by_one=options.offloads_params)
        proven.add(case)
    except ExtraArgumentMissing:
        if complete:
            raise


@lru_cache(maxsize=16)
def _proven_cases(tx: optax.GradientTransformationExtraArgs) -> set[Any]:
    """The cases in which a transformation is known to treat leaves separately. A proof is a trace, made only once."""
    return set()


def _type(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def _slices(x: Any, n: int, sharding: Sharding) -> Any:
    """Splits an array's first axis into ``n`` microbatches, each spread as the batch is."""

    def split(x: jax.Array) -> jax.Array:
        shape = (n, x.shape[0] // n, *x.shape[1:])
        slices = lax.reshape(x, shape, out_sharding=of_stack(explicit_sharding(x)))
        return constrain(slices, of_stack(sharding))

    return jax.eval_shape(split, x) if isinstance(x, jax.ShapeDtypeStruct) else split(jnp.asarray(x))
