"""Complex parameters equal NumPy in complex128, and parameters that are not of floats are refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import root_mean_square
from tolerances import assert_apart, assert_close

from adalomo_jax.optimizers import adalomo, lomo, scale_by_adalomo, scale_by_param_rms

SHAPES = {"bias": (5,), "conv": (2, 4, 3), "matrix": (3, 4)}


def tree(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: (rng.standard_normal(s) + 1j * rng.standard_normal(s)).astype(np.complex64) for n, s in SHAPES.items()}


def adalomo_in_numpy(theta: Any, g: Any, moment: Any, t: int) -> Any:
    """The docstring's equations at a rate of 0.1, with the decay 0.5; ``|g|**2`` in place of ``g**2``."""
    theta, g = theta.astype(np.complex128), g.astype(np.complex128)
    s, share = np.abs(g) ** 2, float(t) ** -0.8
    if g.ndim < 2:
        v = moment = (1 - share) * moment + share * s
    else:
        row, col = moment = [(1 - share) * old + share * s.mean(axis) for old, axis in zip(moment, (-1, -2))]
        v = row[..., :, None] * col[..., None, :] / row.mean(-1)[..., None, None]
    u = g / np.sqrt(v)
    u = u / max(1.0, root_mean_square(u))
    return theta - 0.1 * max(1e-3, root_mean_square(theta)) * (u + 0.5 * theta), moment


def lomo_in_numpy(theta: Any, g: Any, moment: Any, t: int) -> Any:
    theta, g = theta.astype(np.complex128), g.astype(np.complex128)
    return theta - 0.1 * (g / np.maximum(1, np.abs(g) / 0.7) + 0.5 * theta), moment


RULES: dict[str, Any] = {
    "adalomo": (adalomo(0.1, weight_decay=0.5), adalomo_in_numpy),
    "lomo": (lomo(0.1, weight_decay=0.5, clip_value=0.7), lomo_in_numpy),
}


@pytest.mark.parametrize("name", RULES)
def test_complex_parameters_move_by_the_equations(name: str):
    tx, in_numpy = RULES[name]
    params, expected = jax.tree.map(jnp.asarray, tree(0)), tree(0)
    moments: Any = {n: 0.0 if p.ndim < 2 else (0.0, 0.0) for n, p in expected.items()}
    update, state = jax.jit(tx.update), tx.init(params)
    assert all(x.dtype in ("float32", "int32") for x in jax.tree.leaves(state))
    for t in (1, 2):
        g = tree(10 * t)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        steps = {n: in_numpy(expected[n], g[n], moments[n], t) for n in SHAPES}
        expected, moments = {n: step[0] for n, step in steps.items()}, {n: step[1] for n, step in steps.items()}
    for part in (np.real, np.imag):
        assert_close(jax.tree.map(part, params), jax.tree.map(part, expected))
        assert_apart(jax.tree.map(part, params), jax.tree.map(part, tree(0)))


@pytest.mark.parametrize("dtype", ["int32", "bool"])
@pytest.mark.parametrize("tx", [adalomo(0.1), lomo(0.1), scale_by_adalomo(), scale_by_param_rms()])
def test_what_is_of_no_floats_is_refused(tx: Any, dtype: str):
    floats, others = {"w": jnp.ones((2, 3))}, {"w": jnp.ones((2, 3), dtype)}
    with pytest.raises(ValueError, match=rf"^grads\['w'\] must be of floats, got {dtype}; leave it out"):
        tx.update(others, tx.init(floats), floats)
    if tx.init(floats) != optax.EmptyState():
        with pytest.raises(ValueError, match=rf"^params\['w'\] must be of floats, got {dtype}"):
            tx.init(others)
