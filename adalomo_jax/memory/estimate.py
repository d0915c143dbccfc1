"""What a training step needs, estimated from shapes where no compiler is at hand."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from adalomo_jax.fused import FusedStep
from adalomo_jax.fused.plan.jaxpr import Program, trace
from adalomo_jax.memory.compile import place, shares_of, whole_bytes
from adalomo_jax.memory.liveness import temporary_bytes
from adalomo_jax.memory.placement import TPU_GRANULE, Chip, table_bytes
from adalomo_jax.memory.targets import Target
from adalomo_jax.memory.tiles import lies_transposed, row_major_bytes, tiled_bytes
from adalomo_jax.memory.usage import Usage


def estimate_usage(step: FusedStep, params: Any, *args: Any, target: Target, fused: bool = True) -> Usage:
    """What `compile_usage` returns, of one chip, from the step's equations and their shapes: marked as an estimate.

    The arguments are counted, and the temporaries are those of the traced step, with their lifetimes, under the
    rules of :mod:`adalomo_jax.memory.liveness`. Of the chip it knows its limit, and of a TPU the tiles that arguments
    lie in, its cores and their vector memory. It is made for accelerators, and is nearest where what loops carry either
    all fits in a TPU's vector memory or is far too large for it.

    Args and returns as of `compile_usage`. No plugin is needed, and nothing is compiled.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from adalomo_jax import adalomo, fuse
        >>> from adalomo_jax.memory import TARGETS, estimate_usage
        >>> params = {"layers": jax.ShapeDtypeStruct((12, 64, 64), jnp.float32)}
        >>> layer = lambda x, w: (x + jnp.tanh(x @ w), None)
        >>> loss_fn = lambda params, x: jnp.mean(jax.lax.scan(layer, x, params["layers"])[0] ** 2)
        >>> x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
        >>> usage = estimate_usage(fuse(loss_fn, adalomo(1e-2)), params, x, target=TARGETS["tpu-v5e"])
        >>> usage.estimated, usage.fits
        (True, True)
    """
    began = time.perf_counter()
    params, args = place((params, args), SingleDeviceSharding(jax.devices("cpu")[0]))
    state = step.abstract_state(params, *args)
    shares = shares_of(step, params, state, args, fused)
    given = jax.tree.leaves((params, state))
    structure = jax.tree.structure((params, state, args))
    run = step if fused else step.unfused
    program, _ = trace(lambda leaves: run(*_call(structure, leaves)), jax.tree.leaves((params, state, args)))
    is_tpu = target.platform == "tpu"
    size_of = tiled_bytes if is_tpu else whole_bytes
    argument_bytes = sum(map(size_of, jax.tree.leaves((params, state, args))))
    updated = sum(map(size_of, given))
    copied = {i: row_major_bytes(x) for i, x in enumerate(given) if is_tpu and lies_transposed(x)}
    in_place = {i: i for i in range(len(given))}
    temp_bytes = _temporary_bytes(program, in_place, copied, argument_bytes, _chip(target))
    return Usage(
        params_bytes=shares.params,
        state_bytes=shares.state,
        gradient_bytes=shares.gradient,
        saved_bytes=shares.saved,
        argument_bytes=argument_bytes,
        alias_bytes=updated,
        output_bytes=updated,
        temp_bytes=temp_bytes,
        peak_bytes=argument_bytes + temp_bytes,
        host_bytes=0,
        limit_bytes=target.limit_bytes,
        compile_seconds=time.perf_counter() - began,
        estimated=True,
    )


def _chip(target: Target) -> Chip:
    granule = TPU_GRANULE if target.platform == "tpu" else 1
    return Chip(target.platform, target.vector_mib * 2**20, target.cores, granule)


def _temporary_bytes(
    program: Program, in_place: Mapping[int, int], copied: Mapping[int, int], argument_bytes: int, chip: Chip
) -> int:
    of = lambda chip: temporary_bytes(program, in_place, copied=copied, chip=chip)
    if not chip.vector_bytes:
        return of(chip)
    holds_all = chip.cores == 1 and argument_bytes + of(chip._replace(vector_bytes=0)) <= chip.vector_bytes
    return of(chip._replace(holds_all=holds_all)) + table_bytes(program, chip)


def _call(structure: Any, leaves: Any) -> tuple[Any, ...]:
    params, state, args = jax.tree.unflatten(structure, leaves)
    return params, state, *args
