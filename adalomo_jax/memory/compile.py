"""The memory of a training step as a chip's compiler reports it, without the chip."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding

from adalomo_jax.fused import FusedStep
from adalomo_jax.memory.collectives import collectives_in
from adalomo_jax.memory.targets import Target, devices_of
from adalomo_jax.memory.usage import Usage, peak_of
from adalomo_jax.optimizers.kept import is_kept

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_HOST = ("pinned_host", "unpinned_host")


class Shares(NamedTuple):
    """Bytes on a chip of a step's arguments, and of what follows from its shapes alone."""

    params: int
    state: int
    gradient: int
    saved: int
    host: int


def compile_usage(step: FusedStep, params: Any, *args: Any, target: Target, fused: bool = True) -> Usage:
    """Compiles ``step.jit(params, step.init(params, *args), *args)`` for a target, and returns what it needs there.

    Nothing is allocated and nothing is run.

    Args:
        step: what ``fuse(loss_fn, tx)`` returns, for any loss and transformation.
        params: arrays, or ``jax.ShapeDtypeStruct``s. A ShapeDtypeStruct with a ``NamedSharding`` over
            ``devices_of(target, chips)`` keeps it, memory kind included. Without any, all is for one chip.
        *args: the other arguments of the loss, in the same forms.
        target: of `TARGETS`.
        fused: whether to compile the fused step, or ``step.unfused`` with the same arguments donated.

    Returns:
        Bytes on one chip. If the compiler refuses the program for lack of memory, it does not fit, and its size is the
        one that the refusal names.

    Raises:
        Unavailable: the compiler for the target is not installed.
        Exception: the compiler's, if it refuses the program for another reason.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from adalomo_jax import adalomo, fuse
        >>> from adalomo_jax.memory import TARGETS, compile_usage
        >>> params = {"layers": jax.ShapeDtypeStruct((12, 64, 64), jnp.float32)}
        >>> layer = lambda x, w: (x + jnp.tanh(x @ w), None)
        >>> loss_fn = lambda params, x: jnp.mean(jax.lax.scan(layer, x, params["layers"])[0] ** 2)
        >>> x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
        >>> usage = compile_usage(fuse(loss_fn, adalomo(1e-2)), params, x, target=TARGETS["cpu"])
        >>> usage.params_bytes == 12 * 64 * 64 * 4, usage.gradient_bytes == 64 * 64 * 4, usage.fits
        (True, True, True)
    """
    mesh = mesh_of((params, args))
    chips = 1 if mesh is None else mesh.size
    default = SingleDeviceSharding(devices_of(target)[0]) if mesh is None else NamedSharding(mesh, jax.P())
    params, args = place((params, args), default)
    state = place(step.abstract_state(params, *args), default)
    shares = shares_of(step, params, state, args, fused)
    jitted = step.jit if fused else jax.jit(step.unfused, donate_argnums=(0, 1))
    lowered = jitted.lower(params, state, *args)
    limit = limit_of_chip(target, chips)
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        return _refused(shares, needed, limit, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    collectives = {} if chips == 1 else collectives_in(compiled.as_text() or "")
    return replace(_accepted(shares, compiled.memory_analysis(), limit, seconds), collectives=collectives)


def needed_bytes(message: str) -> int | None:
    """The size that a compiler's refusal for lack of memory names; None if the message is of another kind.

    Example:
        >>> needed_bytes("RESOURCE_EXHAUSTED: ... the total memory required for HLO temporaries (26.96G) exceeds ...")
        28948079575
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds|Used ([\d.]+)([KMGT]?) of", message)
    if found is None:
        return None
    number, unit = (part for part in found.groups() if part is not None)
    return round(float(number) * _UNITS[unit])


def limit_of_chip(target: Target, chips: int) -> int:
    """Each device that a CPU is divided into has an equal part of its memory."""
    return target.limit_bytes // chips if target.platform == "cpu" else target.limit_bytes


def shares_of(step: FusedStep, params: Any, state: Any, args: Sequence[Any], fused: bool) -> Shares:
    """Bytes on a chip of the arguments by kind, of the gradients alive at once, and of the saved residuals."""
    plan = step.plan(params, *args)
    leaves = [jax.tree.leaves(x)[0] for x in jax.tree.leaves(params, is_leaf=is_kept)]
    shares = [shard_bytes(x) / max(1, whole_bytes(x)) for x in leaves]
    if fused:
        at = lambda s: sum(leaf.gradient_bytes_at(s) * share for leaf, share in zip(plan.leaves, shares, strict=True))
        gradient = max(map(at, range(len(plan.stages))), default=0)
    else:
        sizes = [math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in plan.leaves]
        gradient = sum(n * share for n, share, leaf in zip(sizes, shares, plan.leaves, strict=True) if leaf.trained)
    # Residuals are sharded as the batch is. The unfused step saves those of one microbatch at a time.
    batch_share = sum(map(shard_bytes, jax.tree.leaves(args))) / max(1, sum(map(whole_bytes, jax.tree.leaves(args))))
    saved = step.saved_bytes(params, *args) * batch_share / (1 if fused else step.options.microbatches or 1)
    if step.options.offloads_activations:
        saved = 0
    on_chip = lambda tree: sum(shard_bytes(x) for x in jax.tree.leaves(tree) if not on_host(x))
    on_hosts = sum(shard_bytes(x) for x in jax.tree.leaves((params, state, args)) if on_host(x))
    return Shares(on_chip(params), on_chip(state), round(gradient), round(saved), on_hosts)


def shard_bytes(x: Any) -> int:
    """Bytes of an array on one chip."""
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


def whole_bytes(x: Any) -> int:
    """Bytes of an array on all chips together, copies not counted."""
    return math.prod(x.shape) * x.dtype.itemsize


def on_host(x: Any) -> bool:
    """Whether an array lies in the host's memory."""
    return x.sharding is not None and x.sharding.memory_kind in _HOST


def mesh_of(tree: Any) -> Any:
    """The mesh that abstract arrays of a tree are sharded over; None if there is none."""
    return next((x.sharding.mesh for x in jax.tree.leaves(tree) if _is_sharded(x)), None)


def place(tree: Any, default: Any) -> Any:
    """The tree as abstract arrays, each with its own sharding over a mesh, or the default."""
    on = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if _is_sharded(x) else default)
    return jax.tree.map(on, tree)


def _is_sharded(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct) and isinstance(x.sharding, NamedSharding)


def _accepted(shares: Shares, sizes: Any, limit: int, seconds: float) -> Usage:
    new_on_host = sizes.host_output_size_in_bytes - sizes.host_alias_size_in_bytes
    return Usage(
        params_bytes=shares.params,
        state_bytes=shares.state,
        gradient_bytes=shares.gradient,
        saved_bytes=shares.saved,
        argument_bytes=sizes.argument_size_in_bytes,
        alias_bytes=sizes.alias_size_in_bytes,
        output_bytes=sizes.output_size_in_bytes,
        temp_bytes=sizes.temp_size_in_bytes,
        peak_bytes=peak_of(sizes),
        host_bytes=sizes.host_argument_size_in_bytes + new_on_host + sizes.host_temp_size_in_bytes,
        limit_bytes=limit,
        compile_seconds=seconds,
    )


def _refused(shares: Shares, needed: int, limit: int, seconds: float) -> Usage:
    return Usage(
        params_bytes=shares.params,
        state_bytes=shares.state,
        gradient_bytes=shares.gradient,
        saved_bytes=shares.saved,
        argument_bytes=None,
        alias_bytes=None,
        output_bytes=None,
        temp_bytes=None,
        peak_bytes=needed,
        host_bytes=shares.host,
        limit_bytes=limit,
        compile_seconds=seconds,
        refused=True,
    )
