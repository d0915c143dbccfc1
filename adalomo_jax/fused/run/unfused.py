"""The gradients of all parameters at once, by ``jax.vjp``, for the step that a fused step must equal."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from adalomo_jax.fused.plan.placed_tree import unstack_layers
from adalomo_jax.fused.plan.tracing import Traced
from adalomo_jax.optimizers.kept import as_floats
from adalomo_jax.optimizers.precision import add, promoted


def all_gradients(
    loss_fn: Callable[..., Any], traced: Traced, microbatches: int | None, d_loss: jax.Array
) -> tuple[list[Any], dict[int, Any]]:
    """The leaves of what the loss returns, and the gradients of the trained parameters by position.

    Over microbatches, results are stacked and gradients summed in float32. ``d_loss`` is the cotangent of each loss.
    """
    floats = list(map(as_floats, traced.leaves))
    trained = {i: x for i, (x, leaf) in enumerate(zip(floats, traced.plan.leaves)) if leaf.trained}

    def of_one(slices: dict[int, Any]) -> tuple[list[Any], dict[int, Any]]:
        args = traced.args_treedef.unflatten([slices.get(i, x) for i, x in enumerate(traced.args)])

        def run(trained: dict[int, Any]) -> tuple[Any, list[Any]]:
            leaves = [trained.get(i, x) for i, x in enumerate(floats)]
            results = jax.tree.leaves(loss_fn(unstack_layers(traced.treedef.unflatten(leaves)), *args))
            return results[0], results

        loss, pullback, results = jax.vjp(run, trained, has_aux=True)
        return results, pullback(jnp.asarray(d_loss, jnp.result_type(loss)))[0]

    if microbatches is None:
        return of_one({})

    def iteration(sums: dict[int, Any], slices: dict[int, Any]) -> tuple[dict[int, Any], list[Any]]:
        results, gradients = of_one(slices)
        return {i: add(sums[i], gradients[i]) for i in sums}, results

    zeros = {i: jnp.zeros(x.shape, promoted(x.dtype, jnp.float32)) for i, x in trained.items()}
    slices = {i: x for i, (x, is_sliced) in enumerate(zip(traced.args, traced.sliced)) if is_sliced}
    gradients, results = lax.scan(iteration, zeros, slices, length=microbatches)
    return results, gradients
