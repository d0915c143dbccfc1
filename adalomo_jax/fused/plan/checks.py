"""Checks that refuse bad input while tracing. Errors say the invariant, the value, and the way out."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adalomo_jax.fused.offload import is_on_host
from adalomo_jax.fused.options import Options
from adalomo_jax.fused.plan.contents import reads_references
from adalomo_jax.fused.plan.jaxpr import Program
from adalomo_jax.fused.plan.lists import Lists
from adalomo_jax.fused.plan.paths import leaves_with_paths
from adalomo_jax.fused.plan.plan import LayerScan, Plan
from adalomo_jax.fused.plan.selection import leaves_on_host
from adalomo_jax.jax_versions import varying_axes
from adalomo_jax.optimizers.choice import shown
from adalomo_jax.optimizers.kept import is_kept


def check_args(args: Sequence[Any]) -> None:
    """Refuses arguments of the loss that are not arrays."""
    for path, x in leaves_with_paths(tuple(args)):
        if not (isinstance(x, jax.ShapeDtypeStruct) or _is_array(x)):
            raise ValueError(
                f"The arguments of loss_fn must be arrays, but {_argument(path)} is {shown(x)}, of the type "
                f"{type(x).__name__}. Close over it in loss_fn instead."
            )


def check_returned(result: Any) -> None:
    """Refuses a loss, or aux returned beside it, that is not an array."""
    for path, x in leaves_with_paths(result):
        if not _is_array(x):
            name = f"its leaf {jax.tree_util.keystr(path)}" if path else "it"
            raise ValueError(
                f"What loss_fn returns must be arrays, but {name} is {shown(x)}, of the type {type(x).__name__}. "
                "Return it from elsewhere, or leave it out."
            )


def _is_array(x: Any) -> bool:
    """Whether JAX accepts a value as an array."""
    try:
        jax.typeof(x)
    except TypeError:
        return False
    return True


def _argument(path: Any) -> str:
    """The name of a leaf of the arguments, counted as `batch_argnums` counts them."""
    position, *rest = path
    return f"argument {position.idx + 1} of loss_fn{jax.tree_util.keystr(tuple(rest))}"


_RAW_KEYS = ((2,), (4,))
"""The shapes of untyped PRNG keys: those of threefry and of rbg."""


def check_batch(options: Options, args: Sequence[Any]) -> None:
    """Refuses a batch that the number of microbatches does not divide."""
    if options.microbatches is None:
        return
    absent = [position for position in options.argnums if position > len(args)]
    if absent:
        raise ValueError(
            f"batch_argnums names argument {absent[0]} of loss_fn, counting the parameters as 0, but it was "
            f"called with {len(args)} after them."
        )
    positions = [position for position in range(len(args)) if options.is_batch(position)]
    if not any(jax.tree.leaves(args[position]) for position in positions):
        raise ValueError(
            f"microbatches={options.microbatches} slices the arguments {options.batch_argnums or 'after params'} of "
            f"loss_fn, but it was called with {len(args)} after params, and those to slice hold no array."
        )
    sizes: dict[int, str] = {}
    for position in positions:
        for path, x in leaves_with_paths(args[position]):
            shape, name = jnp.shape(x), f"argument {position + 1} of loss_fn{jax.tree_util.keystr(path)}"
            if options.batch_argnums is None and jnp.result_type(x) == jnp.uint32 and shape in _RAW_KEYS:
                raise ValueError(
                    f"microbatches={options.microbatches} would cut {name} in parts, a uint32{list(shape)}, which "
                    "looks like a raw PRNG key. Name the arguments to slice with batch_argnums."
                )
            if not shape or shape[0] % options.microbatches:
                raise ValueError(
                    f"microbatches={options.microbatches} must divide the first axis of each sliced array, but {name} "
                    f"has the shape {shape}. Name the arguments to slice with batch_argnums, or change the batch."
                )
            sizes.setdefault(shape[0], f"{name} has the shape {shape}")
    if len(sizes) > 1:
        (_, first), (_, other), *_ = sizes.items()
        raise ValueError(
            f"microbatches={options.microbatches} slices the first axis, which must have one size in a batch, "
            f"but {first}, and {other}. Name the arguments to slice with batch_argnums, and pass anything that is no "
            "batch, such as a mask, a table or running statistics, as a separate argument."
        )


def check_extra_args(extra_args: Mapping[str, Any]) -> None:
    """Refuses extra arguments of ``tx.update`` that are not arrays."""
    for path, x in leaves_with_paths(dict(extra_args)):
        if not isinstance(x, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
            raise ValueError(
                f"Arguments by name go to tx.update, in each layer's update, and must be trees of arrays, but "
                f"{jax.tree_util.keystr(path)} is of the type {type(x).__name__}. Arguments of the loss are given by "
                "position; a tx that calls a function of all parameters, as a line search does, cannot be fused."
            )


def check_by_position(loss_fn: Callable[..., Any], args: Sequence[Any], extra_args: Mapping[str, Any]) -> None:
    """Refuses an argument of the loss given by name: it would go to ``tx.update``, and the loss would not see it."""
    try:
        bound = inspect.signature(loss_fn).bind_partial(None, *args)
    except (TypeError, ValueError):  # no signature, or a wrong call, which the loss itself will report
        return
    free = bound.signature.parameters.keys() - bound.arguments.keys()
    for name in free & extra_args.keys():
        raise ValueError(
            f"Arguments of the loss are given by position, but {name!r} was given by name, and those go to tx.update."
        )


def check_loss(avals: Sequence[Any], result_treedef: Any, has_aux: bool) -> None:
    """Refuses a loss that is not one float."""
    children = result_treedef.children()
    if has_aux and len(children) != 2:
        raise ValueError(f"With has_aux=True, loss_fn must return (loss, aux), but it returned {result_treedef}.")
    loss_treedef = children[0] if has_aux else result_treedef
    if loss_treedef != jax.tree.structure(0):
        raise ValueError(
            f"loss_fn must return one scalar, but it returned {result_treedef}. "
            "If it returns (loss, aux), say fuse(..., has_aux=True)."
        )
    if avals[0].shape != () or not jnp.issubdtype(avals[0].dtype, jnp.floating):
        raise ValueError(f"The loss must be a float scalar, but it is {avals[0].str_short()}. Take its mean or sum.")


def check_program(program: Program, paths: Sequence[str], trained: Sequence[bool]) -> None:
    """Refuses a loss that changes arrays in place, or a loss or trained parameters that differ within ``shard_map``."""
    if reads_references(program):
        raise ValueError(
            "The loss uses references (jax.new_ref), through which fuse does not see what depends on what: "
            "carry the value through the loss, or return it as aux."
        )
    for v, path, is_trained in zip(program.inputs, paths, trained):
        if is_trained and (axes := varying_axes(program.avals[v])):
            raise ValueError(
                f"Within jax.shard_map trained parameters must be the same on all devices, but {path!r} differs along "
                f"the mesh axes {sorted(axes)}. Spread them by their NamedSharding instead, without shard_map."
            )
    if axes := varying_axes(program.avals[program.outputs[0]]):
        raise ValueError(
            f"Within jax.shard_map the loss must be the same on all devices, but it differs along the mesh axes "
            f"{sorted(axes)}. Return its mean over them, jax.lax.pmean(loss, {tuple(sorted(axes))})."
        )


def check_blocks(plan: Plan, leaves: Sequence[Any]) -> None:
    """Refuses a stack in another form if a block holds entries of several layers: layers are written one by one."""
    for stack in (stack for stage in plan.stages if isinstance(stage, LayerScan) for stack in stage.stacks):
        leaf = leaves[stack.leaf]
        if is_kept(leaf) and leaf.cuts(stack.axis):
            axis = stack.axis - leaf.ndim
            raise ValueError(
                f"A layer of a stack must have blocks of its own, but {plan.leaves[stack.leaf].path!r} is kept as "
                f"{leaf.form}, and its layers lie along that axis. Encode it along another, as with "
                f"int8(params, axis={-1 if axis != -1 else -2})."
            )


def check_strict(plan: Plan) -> None:
    """Refuses a plan in which layers, of a scan or of a list, are not updated one by one."""
    lists = plan.lists if plan.may_repeat else Lists()
    for repeat in [*lists.repeats, *lists.too_few]:
        roll = f"={repeat.layers}" if repeat in lists.too_few else "=True"
        raise ValueError(
            f"strict=True, but {repeat.layers} layers repeat in a list, whose gradients may all be alive at once. "
            f"Stack them with roll{roll} and params = step.place(params, *args) (FusedOptimizer and TrainState: "
            f"roll{roll} alone), or leave strict out."
        )
    misplaced = [f"{leaf.path!r} ({leaf.reason})" for leaf in plan.leaves if leaf.misplaced]
    if misplaced:
        raise ValueError(
            f"strict=True, but these cannot be updated layer by layer: {', '.join(misplaced)}. "
            "Let only one scan run over them, or leave strict out to have them updated whole."
        )


def warn_of_whole(plan: Plan) -> None:
    """Warns of scanned layers that are not updated one by one: the step is correct, but takes more memory."""
    for leaf in plan.leaves:
        if leaf.misplaced:
            size = math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
            warnings.warn(
                f"{leaf.path!r} is updated whole, though its layers are stacked: {leaf.reason}. Its whole gradient "
                f"of {size:,} bytes exists at once. Let only one scan run over it; other readers can take one layer "
                "at a time and add up, as a sum of squares does. fuse(..., strict=True) makes this an error.",
                stacklevel=3,
            )


def check_placed(plan: Plan, leaves: Sequence[Any], options: Options) -> None:
    """Refuses parameters that are not in the memory that ``offload`` asks for."""
    on_host = leaves_on_host(plan, options)
    for i, (leaf, x) in enumerate(zip(plan.leaves, leaves, strict=True)):
        if is_on_host(x) != (i in on_host):
            is_in, due = ("host", "device") if is_on_host(x) else ("device", "host")
            raise ValueError(
                f"With offload={options.offload!r}, {leaf.path!r} must be in {due} memory, but it is in {is_in} "
                "memory. Put the parameters where they belong with params = step.place(params, *args)."
            )


def check_not_deleted(what: Any, name: str) -> None:
    """Refuses arrays whose memory an earlier step has taken."""
    for path, x in jax.tree_util.tree_leaves_with_path(what):
        if isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.is_deleted():
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} was given to an earlier step, which updated it in place: it no "
                "longer exists. Go on with the params and state that the step returned, or keep a copy of those you "
                "need again."
            )


def check_state(inner: Any, expected: Any) -> None:
    """Refuses optimizer state that `init` did not make for these parameters."""
    way_out = "Make it with step.init(params, *args) for the parameters and the loss that the step is called with."
    if jax.tree.structure(inner) != jax.tree.structure(expected):
        raise ValueError(f"The state is not that of these parameters and this tx. {way_out}")
    for (path, leaf), want in zip(leaves_with_paths(inner), jax.tree.leaves(expected)):
        if jnp.shape(leaf) != want.shape:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"The state's {name} has the shape {jnp.shape(leaf)}, but {want.shape} is due. {way_out} To go on "
                "with it, give tx the options that it was made with, such as matrix_axes=None to adalomo."
            )
