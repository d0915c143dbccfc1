"""Checks of the rules' arguments, made as they are passed. Errors are one line: the name, what must hold, the value."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer


def check_number(name: str, value: Any, holds: Callable[[float], bool], invariant: str, way_out: str = "") -> None:
    """Refuses anything but one finite real number that ``holds`` accepts. A traced value, not yet known, passes."""
    if isinstance(value, Tracer):
        return
    number = _as_number(value)
    if number is None or not math.isfinite(number) or not holds(number):
        raise ValueError(f"{name} must be {invariant}, got {_shown(value if number is None else number)}{way_out}.")


def check_above_zero(name: str, value: Any, way_out: str = "") -> None:
    """Refuses anything but a finite number above 0."""
    check_number(name, value, lambda x: x > 0, "above 0 and finite", way_out)


def check_not_negative(name: str, value: Any) -> None:
    """Refuses anything but a finite number of at least 0."""
    check_number(name, value, lambda x: x >= 0, "at least 0 and finite")


def check_learning_rate(value: optax.ScalarOrSchedule) -> None:
    """Refuses anything but a schedule or a finite number of at least 0."""
    if not callable(value):
        check_number("learning_rate", value, lambda x: x >= 0, "a schedule, or at least 0 and finite")


def checked_mask(name: str, mask: Any) -> Any:
    """A mask as Optax takes it. Refuses a tree of anything but bools, because Optax would use any value's truth."""
    if mask is None:
        return None
    if callable(mask):
        return lambda params: _check_bools(name, mask(params))
    return _check_bools(name, mask)


def check_floats(name: str, tree: Any) -> None:
    """Refuses a tree with leaves that are not floats, real or complex."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            leaf = f"{name}{jax.tree_util.keystr(path)}"
            raise ValueError(f"{leaf} must be of floats, got {jnp.result_type(x)}; leave it out with optax.masked.")


def check_key(key: Any) -> None:
    """Refuses anything but one typed PRNG key."""
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()):
        raise ValueError(f"key must be one typed PRNG key, as jax.random.key(0) is, got {_shown(key)}.")


def check_transformation(tx: Any) -> None:
    """Refuses anything but an Optax gradient transformation."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(f"tx must be an optax.GradientTransformation, such as adalomo(1e-3), got {_shown(tx)}.")


def _check_bools(name: str, mask: Any) -> Any:
    for path, x in jax.tree_util.tree_leaves_with_path(mask):
        if not isinstance(x, bool) and getattr(x, "dtype", None) != np.bool_:
            leaf = f"{name}{jax.tree_util.keystr(path)}"
            raise ValueError(f"{leaf} must be a bool, a tree of bools, or a callable that makes one, got {_shown(x)}.")
    return mask


def _as_number(value: Any) -> float | None:
    """The value as a float, or None if it is no real number: bools are none, and of arrays only scalars are."""
    is_array = isinstance(value, (np.generic, np.ndarray, jax.Array))
    if is_array and (value.ndim or not _is_real(value.dtype)):
        return None
    if isinstance(value, bool) or not (is_array or isinstance(value, (int, float))):
        return None
    return float(value)


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)


def _shown(value: Any) -> str:
    """A value, on one line."""
    return f"an array of shape {value.shape}" if getattr(value, "shape", ()) else " ".join(repr(value).split())
