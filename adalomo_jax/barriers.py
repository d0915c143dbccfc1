"""Barriers: what XLA must compute before it goes on, and how it may lay out arrays in memory.

The CPU compiler drops ``lax.optimization_barrier``, and others know layouts that it does not: each gets its own code.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from adalomo_jax.jax_versions import explicit_sharding, varying_axes, with_axes_in_order


def after(x: jax.Array, computed: Any) -> jax.Array:
    """``x`` itself, but XLA must have computed each of the arrays before ``x`` is known.

    Within a ``shard_map`` it waits only for arrays that are the same wherever ``x`` is: others would make ``x`` differ.
    """
    computed = [y for y in jax.tree.leaves(computed) if varying_axes(y) <= varying_axes(x)]
    # The arithmetic for a CPU needs an array's first entry, which costs a transfer on an explicit mesh.
    with_barrier = lambda x, computed: barrier((x, computed))[0]
    if any(explicit_sharding(y) is not None for y in [x, *computed]):
        return with_barrier(x, computed)
    return lax.platform_dependent(x, computed, cpu=_after_by_arithmetic, default=with_barrier)


def barrier(xs: Any) -> Any:
    """``lax.optimization_barrier`` for each set of arrays that vary along the same ``shard_map`` axes, as JAX wants."""
    leaves, treedef = jax.tree.flatten(xs)
    done = dict[int, Any]()
    for axes in dict.fromkeys(map(varying_axes, leaves)):
        alike = [k for k, x in enumerate(leaves) if varying_axes(x) == axes]
        done |= zip(alike, lax.optimization_barrier([leaves[k] for k in alike]))
    return treedef.unflatten([done[k] for k in range(len(leaves))])


def once_written(x: jax.Array, written: Any) -> jax.Array:
    """``x`` itself; on an accelerator it is known only once the arrays ``written`` have been written.

    Otherwise XLA may go on with ``x`` first, and keep alive everything that they are computed from. The CPU compiler
    does not, and the arithmetic that orders it would cost copies.
    """
    return lax.platform_dependent(x, written, cpu=lambda x, _: x, default=after)


def in_order(x: Any) -> Any:
    """The array itself, with its axes in order in memory; unchanged on a CPU, whose compiler never reorders them.

    There the constraint would only copy a layer that can be read from its stack.
    """
    if x.ndim < 2:
        return x
    if x.dtype.itemsize == 1:  # a TPU's compiler would give such an array other tiles than its stack has, and copy that
        return lax.platform_dependent(x, cpu=lambda x: x, tpu=lambda x: x, default=with_axes_in_order)
    return lax.platform_dependent(x, cpu=lambda x: x, default=with_axes_in_order)


def each_known(test: Callable[[jax.Array], jax.Array], xs: list[jax.Array]) -> list[jax.Array]:
    """A test of each scalar. On a CPU no result is known before all are: if writes wait for them, less is alive."""
    together = lambda xs: list(test(jnp.stack(xs)))
    return lax.platform_dependent(xs, cpu=together, default=lambda xs: [test(x) for x in xs])


def _after_by_arithmetic(x: jax.Array, computed: list[jax.Array]) -> jax.Array:
    """`after` for the CPU, whose compiler drops optimization barriers before it orders reads and writes.

    The summand is always 0, because the sign bits are shifted out; XLA does not fold that. tests/fused/test_memory.py
    sees copies of stacks if this fails.
    """
    if not computed:
        return x
    entries = jnp.concatenate([jnp.real(y).ravel()[:1].astype(jnp.float32) for y in computed])
    bits = lax.bitcast_convert_type(entries, jnp.uint32)
    return x + jnp.sum((bits >> 31) >> 1).astype(x.dtype)
