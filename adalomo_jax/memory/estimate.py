"""A lower bound of a training step's memory from shapes alone. It needs no compiler."""

from __future__ import annotations

import time
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from adalomo_jax.fused import FusedStep
from adalomo_jax.memory.compile import place, shares_of, whole_bytes
from adalomo_jax.memory.targets import Target
from adalomo_jax.memory.usage import Usage


def estimate_usage(step: FusedStep, params: Any, *args: Any, target: Target, fused: bool = True) -> Usage:
    """A lower bound of what `compile_usage` returns for one chip, from shapes. It is marked as an estimate.

    The step must hold its arguments. At one time it also holds all gradients that are alive at once, and at another all
    residuals of the forward pass. ``peak_bytes`` is the arguments and the larger of these two. A TPU may hold the
    larger in its vector memory, which is not counted, so its bound is lower by that size. The bound leaves out what
    else a compiler needs, such as the activations within one layer, copies and padding: if it fits, the step may fit.

    Arguments and result are those of `compile_usage`. It needs no plugin and compiles nothing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from adalomo_jax import adalomo, fuse
        >>> from adalomo_jax.memory import TARGETS, estimate_usage
        >>> params = {"layers": jax.ShapeDtypeStruct((12, 64, 64), jnp.float32)}
        >>> layer = lambda x, w: (x + jnp.tanh(x @ w), None)
        >>> loss_fn = lambda params, x: jnp.mean(jax.lax.scan(layer, x, params["layers"])[0] ** 2)
        >>> x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
        >>> usage = estimate_usage(fuse(loss_fn, adalomo(1e-2)), params, x, target=TARGETS["h100"])
        >>> usage.estimated, usage.peak_bytes - usage.argument_bytes == usage.saved_bytes
        (True, True)
    """
    began = time.perf_counter()
    params, args = place((params, args), SingleDeviceSharding(jax.devices("cpu")[0]))
    state = step.abstract_state(params, *args)
    shares = shares_of(step, params, state, args, fused)
    bytes_of = lambda tree: sum(map(whole_bytes, jax.tree.leaves(tree)))
    argument_bytes, updated = bytes_of((params, state, args)), bytes_of((params, state))
    temp_bytes = max(0, max(shares.gradient, shares.saved) - target.vector_mib * 2**20)
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
