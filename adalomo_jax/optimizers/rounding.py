"""Writing updates to weights, with stochastic rounding if the weights are narrower than float32.

Most of AdaLomo's steps are smaller than half a unit in the last place of a bfloat16 weight: rounded to nearest, they
vanish. Rounded up or down at random, in proportion to the distances, they are right on average. The random bits are a
hash of the key and of the entry's position, computed where they are used: no array of them exists, and on a mesh each
device makes its own.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax import lax

from adalomo_jax.optimizers.arguments import check_key

_FLOAT32_MANTISSA = 23


def rounds_stochastically(dtype: jax.typing.DTypeLike) -> bool:
    """Whether weights of this dtype are rounded stochastically when a key is given: bfloat16 and float16."""
    return jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def is_too_narrow(dtype: jax.typing.DTypeLike) -> bool:
    """Whether weights of this dtype cannot be trained here: floats of 8 bits and fewer."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16


def stochastic_round(x: jax.Array, dtype: jax.typing.DTypeLike, key: jax.Array) -> jax.Array:
    """Rounds float32 ``x`` to one of its two neighbours in ``dtype``, so that the mean over keys is ``x``.

    The mean is exact for bfloat16 and for float16 in its normal range (from 2**-14); among float16's subnormals it is
    within 2**-16 of their spacing. Values that ``dtype`` can represent stay as they are, as do infinities and NaNs.

    Args:
      x: float32, any shape.
      dtype: bfloat16 or float16.
      key: a typed PRNG key; each entry takes 16 random bits from it.

    Returns:
      An array like ``x`` of ``dtype``.

    Raises:
      ValueError: ``dtype`` is another one, ``x`` is not float32, or ``key`` is not one typed key.

    Source: Gupta et al. (2015), https://arxiv.org/abs/1502.02551, section 3.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.full(10_000, 1.001)                        # bfloat16 has 1.0 and 1.0078125 there
      >>> y = stochastic_round(x, jnp.bfloat16, jax.random.key(0))
      >>> print(sorted(set(y.tolist())), round(float(y.astype(jnp.float32).mean()), 3))
      [1.0, 1.0078125] 1.001
    """
    check_key(key)
    if jnp.result_type(x) != jnp.float32:
        raise ValueError(f"x must be float32, got {jnp.result_type(x)}; give it x.astype(jnp.float32).")
    if not rounds_stochastically(dtype):
        raise ValueError(f"dtype must be bfloat16 or float16, got {jnp.dtype(dtype)}.")
    random = hashed_bits(key, x.shape) >> 16
    dropped = _FLOAT32_MANTISSA - jnp.finfo(dtype).nmant
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    # Adding to the bits adds to the magnitude; the probability of a carry is the value of the dropped bits, as a share.
    rounded = (bits + (random >> (16 - dropped))) & jnp.uint32(2**32 - 2**dropped)
    y = lax.bitcast_convert_type(rounded, jnp.float32)
    if jnp.finfo(dtype).minexp > jnp.finfo(jnp.float32).minexp:
        tiny, spacing = jnp.finfo(dtype).smallest_normal, jnp.finfo(dtype).smallest_subnormal
        units = jnp.floor(jnp.abs(x) / spacing.astype(jnp.float32) + random.astype(jnp.float32) * 2.0**-16)
        subnormal = jnp.sign(x) * units * spacing.astype(jnp.float32)
        y = jnp.where(jnp.abs(x) < tiny.astype(jnp.float32), subnormal, y)
    return jnp.where(jnp.isfinite(x), y, x).astype(dtype)


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """32 bits for each entry of an array, uint32, from a typed PRNG key and the entry's position (modulo 2**32)."""
    strides = [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))]
    positions = [lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(len(shape))]
    bits = sum((p * jnp.uint32(n) for p, n in zip(positions, strides)), start=jnp.zeros(shape, jnp.uint32))
    for word in jax.random.key_data(key):
        bits = _mix(bits ^ word)
    return bits


def _mix(x: jax.Array) -> jax.Array:
    """A permutation of the 32-bit numbers in which each bit depends on all (C. Wellons' hash prospector, lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def apply_update(p: jax.Array, u: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """``p + u`` in ``p``'s dtype: to nearest, or stochastically if a key is given and the dtype is narrow."""
    if key is None or not rounds_stochastically(jnp.result_type(p)):
        return jnp.asarray(optax.apply_updates(p, u))
    if rounds_stochastically(u.dtype):
        # XLA may skip rounding u to its dtype in one program and not in another, but their weights must agree.
        u = _to_nearest(u.astype(jnp.float32), u.dtype)
    return stochastic_round(p.astype(jnp.float32) + u.astype(jnp.float32), p.dtype, key)


def _to_nearest(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Float32 ``x``, rounded to the nearest value of a narrow dtype, still in float32. XLA does not skip this."""
    info = jnp.finfo(dtype)
    y = lax.reduce_precision(x, info.nexp, info.nmant)
    if info.minexp == jnp.finfo(jnp.float32).minexp:
        return y
    # reduce_precision turns float16's subnormals into zeros, and steps of a small learning rate are subnormal.
    spacing = info.smallest_subnormal.astype(jnp.float32)
    subnormal = lax.round(x / spacing, lax.RoundingMethod.TO_NEAREST_EVEN) * spacing
    return jnp.where(jnp.abs(x) < info.smallest_normal.astype(jnp.float32), subnormal, y)


def apply_updates(params: optax.Params, updates: optax.Updates, *, key: jax.Array | None = None) -> optax.Params:
    """``optax.apply_updates``, with stochastic rounding of bfloat16 and float16 weights when a key is given.

    Args:
      params: a tree of arrays.
      updates: a tree like ``params``.
      key: a typed PRNG key, a new one for each step; None equals ``optax.apply_updates``.

    Returns:
      A tree like ``params``, with the same dtypes.

    Raises:
      ValueError: a key is given, and it is not one typed key, ``updates`` is not like ``params``, or weights are floats
        of 8 bits.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from adalomo_jax import apply_updates
      >>> params, updates = jnp.ones(4, jnp.bfloat16), jnp.full(4, -1e-3, jnp.bfloat16)
      >>> print(apply_updates(params, updates))              # to nearest, the step is lost
      [1 1 1 1]
      >>> written = [apply_updates(params, updates, key=jax.random.key(i)) for i in range(200)]
      >>> print(round(float(jnp.stack(written).astype(jnp.float32).mean()), 3))
      0.999
    """
    if key is None:
        return optax.apply_updates(params, updates)
    check_key(key)
    _check_like(params, updates)
    leaves, treedef = jax.tree.flatten(params)
    keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
    return treedef.unflatten(map(apply_update, leaves, treedef.flatten_up_to(updates), keys))


def _check_like(params: optax.Params, updates: optax.Updates) -> None:
    """Refuses updates that do not match the parameters one for one, and weights too narrow for stochastic rounding."""
    if jax.tree.structure(params) != jax.tree.structure(updates):
        found, due = (" ".join(str(jax.tree.structure(tree)).split()) for tree in (updates, params))
        raise ValueError(f"updates must be a tree like params, got {found} for {due}.")
    for (path, p), u in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(updates), strict=True):
        name = jax.tree_util.keystr(path)
        if jnp.shape(p) != jnp.shape(u):
            raise ValueError(f"updates{name} must have the shape {jnp.shape(p)} of the parameter, got {jnp.shape(u)}.")
        if is_too_narrow(jnp.result_type(p)):
            raise ValueError(f"params{name} must be of 16 bits at least, got {p.dtype}; keep it in bfloat16.")
