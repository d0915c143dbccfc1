"""lomo equals float64 NumPy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_apart, assert_close

from adalomo_jax.optimizers import lomo

TREE = {"scalar": (), "bias": (5,), "conv": (2, 3, 4)}


def gaussian(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), np.float32)


def tree(seed: int) -> dict[str, np.ndarray]:
    return {name: gaussian(shape, seed + i) for i, (name, shape) in enumerate(TREE.items())}


def matrices_only(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


VARIANTS: list[tuple[dict[str, Any], Callable[[str], dict[str, float]]]] = [
    ({}, lambda name: {}),
    ({"clip_value": 0.5}, lambda name: {"clip_value": 0.5}),
    ({"weight_decay": 0.5}, lambda name: {"weight_decay": 0.5}),
    ({"clip_value": 0.5, "weight_decay": 0.5}, lambda name: {"clip_value": 0.5, "weight_decay": 0.5}),
    (
        {"weight_decay": 0.5, "weight_decay_mask": matrices_only},
        lambda name: {"weight_decay": 0.5 * (len(TREE[name]) > 1)},
    ),
    (
        {"weight_decay": 0.5, "weight_decay_mask": {name: name == "bias" for name in TREE}},
        lambda name: {"weight_decay": 0.5 * (name == "bias")},
    ),
]


@pytest.mark.parametrize("jit", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["jit", "eager"])
@pytest.mark.parametrize("options, options_of", VARIANTS, ids=["-".join(o) or "default" for o, _ in VARIANTS])
def test_equals_the_papers_equation(options: dict[str, Any], options_of: Callable[[str], dict[str, float]], jit: bool):
    tx = lomo(lambda step: 0.1 * (step + 1), **options)
    update = jax.jit(tx.update) if jit else tx.update
    params = jax.tree.map(jnp.asarray, tree(0))
    expected = plain = tree(0)
    state = tx.init(params)
    for t in range(3):
        g, lr = tree(10 * t + 10), 0.1 * (t + 1)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        expected = {name: reference.lomo_step(expected[name], g[name], lr, **options_of(name)) for name in TREE}
        plain = {name: reference.lomo_step(plain[name], g[name], lr) for name in TREE}
        assert_close(params, expected)
    if options:
        assert_apart(params, plain)


@partial(jax.jit, static_argnames="clips")
def one_update(p, g, lr, clip_value, weight_decay, clips: bool):
    tx = lomo(lr, clip_value=clip_value if clips else None, weight_decay=weight_decay)
    return tx.update(g, tx.init(p), p)[0]


@given(
    st.sampled_from(list(TREE.values())), st.integers(0, 2**31), st.floats(1e-5, 10.0), st.floats(1e-3, 10.0),
    st.floats(0.0, 1.0), st.booleans(), st.floats(-20, 20),
)  # fmt: skip
def test_any_tensor(shape, seed, lr, clip_value, weight_decay, clips, log2_scale):
    p, g = gaussian(shape, seed), gaussian(shape, seed + 1) * np.float32(2**log2_scale)
    lr, clip_value, weight_decay = (float(np.float32(x)) for x in (lr, clip_value, weight_decay))
    clip = {"clip_value": clip_value} if clips else {}
    expected = reference.lomo_step(p, g, lr, weight_decay=weight_decay, **clip) - p
    actual = np.asarray(one_update(p, g, lr, clip_value, weight_decay, clips), np.float64)
    # A sum of two terms is as exact as the larger term, not as the sum.
    largest_term = lr * np.max(np.abs([np.clip(g, -clip_value, clip_value) if clips else g, weight_decay * p]))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * largest_term)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_update_is_computed_in_float32_and_rounded_once(dtype: str):
    with jax.enable_x64(dtype == "float64"):
        tx = lomo(0.3, clip_value=0.7, weight_decay=0.5)
        params, g = jax.tree.map(lambda x: jnp.asarray(x, dtype), (tree(0), tree(10)))
        updates, _ = tx.update(g, tx.init(params), params)
        as_float64 = lambda x: np.asarray(x, np.float64)
        expected = {
            name: reference.lomo_step(as_float64(p), as_float64(g[name]), 0.3, clip_value=0.7, weight_decay=0.5)
            - as_float64(p)
            for name, p in params.items()
        }
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        assert_close(updates, expected, dtype)


def test_it_keeps_nothing_but_a_schedules_step_count():
    params = tree(0)
    assert jax.tree.leaves(lomo(0.1, weight_decay=0.1, clip_value=1.0).init(params)) == []
    (count,) = jax.tree.leaves(lomo(lambda step: 0.1).init(params))
    assert (count.shape, count.dtype) == ((), jnp.int32)


@pytest.mark.parametrize("clip_value", [0, 0.0, -1.0])
def test_a_clip_value_that_is_not_above_zero_is_refused(clip_value: float):
    due = rf"clip_value must be above 0 and finite, got {float(clip_value)}; pass None to clip nothing"
    with pytest.raises(ValueError, match=due):
        lomo(0.1, clip_value=clip_value)


def test_parameters_are_needed_for_weight_decay_only():
    g = jnp.ones(3)
    with_params, without = (lomo(0.1).update(g, lomo(0.1).init(g), params)[0] for params in (g, None))
    assert_close(with_params, np.asarray(without, np.float64))
    with pytest.raises(ValueError, match="params"):
        lomo(0.1, weight_decay=0.1).update(g, lomo(0.1, weight_decay=0.1).init(g))
