"""Sets in one place how far apart two programs may be."""

from typing import Any

import jax
import numpy as np

RELATIVE = {
    "float64": 2e-6,  # the arithmetic is float32
    "float32": 2e-6,
    "float16": 2**-11 + 2e-6,  # computed in float32, rounded once: half a unit in the last place
    "bfloat16": 2**-8 + 2e-6,
}
"""The largest error allowed to a tensor's entries, for each dtype, relative to the largest entry."""


def relative_error(actual: Any, expected: Any) -> float:
    """The largest error of an entry between two trees, relative to the largest entry of its tensor."""

    def of_tensor(a: Any, e: Any) -> float:
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape
        if not np.isfinite(a).all():
            return np.inf
        largest = np.max(np.abs(e), initial=0.0)
        return float(np.max(np.abs(a - e), initial=0.0) / (largest or 1.0))

    return max(jax.tree.leaves(jax.tree.map(of_tensor, actual, expected)), default=0.0)


def assert_close(actual: Any, expected: Any, dtype: Any = "float32") -> None:
    error = relative_error(actual, expected)
    assert error <= RELATIVE[np.dtype(dtype).name], error


def assert_apart(actual: Any, expected: Any, dtype: Any = "float32") -> None:
    """The twin of `assert_close`: these differ by far more than rounding."""
    error = relative_error(actual, expected)
    assert error > 5 * RELATIVE[np.dtype(dtype).name], error
