"""Pulls cotangents that are float32 sums over microbatches through pullbacks that take narrower cotangents."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from adalomo_jax.optimizers.precision import add, promoted

Cotangents = dict[int, Any]
"""Cotangents by the number of their value."""

_FLOAT32_DIGITS = 24
"""Binary digits of a float32, including the leading one."""


def accumulate(cotangents: Cotangents, more: Mapping[int, Any]) -> None:
    """Adds cotangents to the present ones."""
    for v, d in more.items():
        cotangents[v] = add(cotangents[v], d) if v in cotangents else d


def pull(
    pullback: Callable[[Cotangents], tuple[Cotangents]], d_outputs: Cotangents, dtypes: Mapping[int, Any]
) -> Cotangents:
    """The cotangents of a pullback's inputs, given those of its outputs, which may be wider than their ``dtypes``.

    A sum over microbatches is float32. Rounding it to the dtype of its value would lose what it was summed for: that
    dtype is bfloat16 if a weight is cast before all microbatches read it. But a pullback is linear. So the sum goes
    through it as several numbers of few digits, and the results are added in float32.
    """
    wide = [v for v, d in d_outputs.items() if jnp.finfo(d.dtype).nmant > jnp.finfo(dtypes[v]).nmant]
    narrow = lambda cotangents: {v: d.astype(dtypes[v]) for v, d in cotangents.items()}
    if not wide:
        return pullback(narrow(d_outputs))[0]
    digits = 1 + min(jnp.finfo(dtypes[v]).nmant for v in wide)
    zeros = {v: jnp.zeros_like(d) for v, d in d_outputs.items()}
    rest = {v: d_outputs[v] for v in wide}
    total: Cotangents = {}
    for k in range(math.ceil(_FLOAT32_DIGITS / digits)):
        # Not by casts: XLA may drop a cast and the cast back, and then nothing is left for the next part.
        part = {v: lax.reduce_precision(d, jnp.finfo(dtypes[v]).nexp, digits - 1) for v, d in rest.items()}
        rest = {v: (rest[v] - part[v]) * 2.0**digits for v in wide}
        pulled = pullback(narrow((zeros if k else d_outputs) | part))[0]
        wider = {v: d.astype(promoted(d.dtype, jnp.float32)) for v, d in pulled.items()}
        accumulate(total, {v: d * 2.0 ** (-k * digits) for v, d in wider.items()})
    return total
