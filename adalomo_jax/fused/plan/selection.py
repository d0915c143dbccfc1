"""Which parameters are trained, and which are kept in host memory."""

from typing import Any

import jax
import jax.numpy as jnp

from adalomo_jax.fused.options import Options
from adalomo_jax.fused.plan.paths import leaves_with_paths, path_name
from adalomo_jax.fused.plan.plan import Plan
from adalomo_jax.optimizers.choice import chosen_leaves, shown
from adalomo_jax.optimizers.kept import is_kept
from adalomo_jax.optimizers.rounding import is_too_narrow


def trained_leaves(params: Any, trainable: Any) -> tuple[bool, ...]:
    """Whether each parameter is trained; refuses those that cannot be."""
    paths_and_leaves = leaves_with_paths(params)
    for path, leaf in paths_and_leaves:
        if callable(leaf) and not hasattr(leaf, "dtype"):
            raise ValueError(
                f"Each leaf of params must be an array, but {path_name(path)!r} is {shown(leaf)}. Keep the "
                "arrays apart: for an Equinox model, params, static = eqx.partition(model, eqx.is_inexact_array), and "
                "in the loss eqx.combine(params, static)."
            )
        if not hasattr(leaf, "dtype"):
            raise ValueError(
                f"Each leaf of params must be an array, but {path_name(path)!r} is of the type {type(leaf).__name__}. "
                "Make it an array, or close over it in the loss."
            )
    if trainable is None:
        asked = [jnp.issubdtype(leaf.dtype, jnp.inexact) for _, leaf in paths_and_leaves]
    else:
        paths = [path_name(path) for path, _ in paths_and_leaves]
        asked = chosen_leaves("trainable", trainable, paths, jax.tree.structure(params, is_leaf=is_kept))
    for (path, leaf), is_asked in zip(paths_and_leaves, asked, strict=True):
        if is_asked and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"A trained parameter must be of floats, but {path_name(path)!r} is of {leaf.dtype}. Leave it out "
                "with trainable=..., or pass it as another argument of the loss."
            )
        if is_asked and is_too_narrow(leaf.dtype):
            raise ValueError(
                f"A trained parameter must be of floats of 16 bits at least, but {path_name(path)!r} is of "
                f"{leaf.dtype}. Keep it in bfloat16 and cast it in the loss, or leave it out with trainable=..."
            )
    if not any(asked):
        raise ValueError(
            f"Nothing is trained: none of the {len(asked)} leaves of params is a float that trainable selects."
        )
    return tuple(asked)


def leaves_on_host(plan: Plan, options: Options) -> tuple[int, ...]:
    """The positions of the parameters that ``offload`` keeps in host memory; raises if there are none to keep."""
    if options.offloads_params and not plan.stacks_of_matrices:
        raise ValueError(
            "offload='params' keeps stacks of matrices in host memory, but no scan runs over one, along an axis before "
            "its last two. Leave 'params' out, or stack the layers along the first axis. The plan is:\n"
            f"{plan}"
        )
    return plan.stacks_of_matrices if options.offloads_params else ()
