"""adalomo equals float64 NumPy in cases for which the official code has no trajectories."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Adalomo
from tiers import slow
from tolerances import assert_apart, assert_close

from adalomo_jax.optimizers import adalomo, per_layer, scale_by_adalomo, scale_by_param_rms

DTYPES = ["float16", "bfloat16", "float32", "float64"]
SHAPES = [(), (1,), (6,), (3, 4), (1, 5), (2, 3, 4), (2, 1, 3, 5)]
TREE = {"scalar": (), "bias": (5,), "matrix": (4, 6), "conv": (3, 2, 4, 5)}
LR = 0.1


def gaussian(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> np.ndarray:
    """Random numbers in rows of different sizes, so that row statistics matter."""
    rng = np.random.default_rng(seed)
    rows = 2.0 ** rng.integers(-3, 3, shape[:-1] + (1,) * bool(shape))
    return (rng.standard_normal(shape) * rows * scale).astype(np.float32)


def tree(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    return {name: gaussian(shape, seed + i, scale) for i, (name, shape) in enumerate(TREE.items())}


def referenced(params: Any, grads: list[Any], lrs: list[float], rules: Any) -> Any:
    """The parameters after each step; ``rules`` is a tree like ``params``."""
    theta, moment = dict(params), {name: reference.init(p) for name, p in params.items()}
    trajectory = []
    for t, (g, lr) in enumerate(zip(grads, lrs), 1):
        steps = {n: reference.adalomo_step(theta[n], g[n], moment[n], t, lr, rules[n]) for n in params}
        theta, moment = {n: step[0] for n, step in steps.items()}, {n: step[1] for n, step in steps.items()}
        trajectory.append(theta)
    return trajectory


def ours(tx: optax.GradientTransformation, params: Any, grads: list[Any]) -> Any:
    update = jax.jit(tx.update)
    params, trajectory = jax.tree.map(jnp.asarray, params), []
    state = tx.init(params)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory


def matrices_only(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


VARIANTS: list[tuple[dict[str, Any], Callable[[str], Adalomo]]] = [
    ({}, lambda name: Adalomo()),
    ({"b2": 0.75}, lambda name: Adalomo(b2=0.75)),
    ({"b2": 0.0}, lambda name: Adalomo(b2=0.0)),
    ({"decay_rate": 0.5}, lambda name: Adalomo(decay_rate=0.5)),
    ({"clipping_threshold": 0.25}, lambda name: Adalomo(clipping_threshold=0.25)),
    ({"eps": 0.125}, lambda name: Adalomo(eps=0.125)),
    ({"min_param_rms": 4.0}, lambda name: Adalomo(min_param_rms=4.0)),
    ({"weight_decay": 0.5}, lambda name: Adalomo(weight_decay=0.5)),
    (
        {"weight_decay": 0.5, "weight_decay_mask": matrices_only},
        lambda name: Adalomo(weight_decay=0.5 * (len(TREE[name]) > 1)),
    ),
    (
        {"weight_decay": 0.5, "weight_decay_mask": {name: name == "bias" for name in TREE}},
        lambda name: Adalomo(weight_decay=0.5 * (name == "bias")),
    ),
]


@pytest.mark.parametrize("constants, rule_of", VARIANTS, ids=["-".join(c) or "default" for c, _ in VARIANTS])
def test_equals_the_papers_equations(constants: dict[str, Any], rule_of: Callable[[str], Adalomo]):
    params, grads = tree(0), [tree(10 * t) for t in (1, 2, 3)]
    rules = {name: rule_of(name) for name in TREE}
    trajectory = ours(adalomo(LR, **constants), params, grads)
    assert_close(trajectory, referenced(params, grads, [LR] * 3, rules))
    if constants:
        assert_apart(trajectory, referenced(params, grads, [LR] * 3, {name: Adalomo() for name in TREE}))


def test_a_schedule_starts_at_step_zero():
    params, grads, lrs = tree(0), [tree(10 * t) for t in (1, 2, 3)], [0.1, 0.2, 0.3]
    rules = {name: Adalomo() for name in TREE}
    trajectory = ours(adalomo(lambda step: 0.1 * (step + 1)), params, grads)
    assert_close(trajectory, referenced(params, grads, lrs, rules))
    assert_apart(trajectory, referenced(params, grads, [0.2, 0.3, 0.4], rules))


@functools.partial(jax.jit, static_argnames=("constant_decay",))
def one_step(params, g, moment, t, constants, constant_decay: bool):
    decay = {} if constant_decay else {"b2": None}
    tx = adalomo(**(constants | decay))
    first, *others = cast(Any, tx.init(params))
    state: Any = (first._replace(count=t - 1, **moment), *others)
    updates, state = tx.update(g, state, params)
    return updates, {name: getattr(cast(Any, state)[0], name) for name in moment}


@settings(max_examples=60)
@given(
    st.sampled_from(SHAPES), st.integers(0, 2**31), st.integers(1, 1000), st.booleans(),
    st.floats(-14, 6), st.floats(-20, 10), st.floats(0.1, 1.0), st.floats(0.0, 0.999), st.floats(0.05, 20.0),
    st.sampled_from([1e-30, 1e-12, 1e-3]), st.floats(0.0, 1.0), st.floats(0.0, 1.0),
)  # fmt: skip
def test_one_step_of_any_tensor_from_any_state(
    shape, seed, t, constant_decay, p_scale, g_scale, decay_rate, b2, threshold, eps, min_rms, weight_decay
):
    p, g = gaussian(shape, seed, 2.0**p_scale), gaussian(shape, seed + 1, 2.0**g_scale)
    previous = gaussian(shape, seed + 2, 2.0**g_scale).astype(np.float64) ** 2 + 1e-30
    names = ["learning_rate", *Adalomo._fields]
    values = np.asarray([0.5, decay_rate, b2, threshold, eps, min_rms, weight_decay], np.float32)
    exact: dict[str, Any] = {name: float(value) for name, value in zip(names, values)}
    lr = exact.pop("learning_rate")
    rule = Adalomo(**exact) if constant_decay else Adalomo(**exact)._replace(b2=None)
    if len(shape) < 2:
        moment, theirs = {"v": jnp.asarray(previous, jnp.float32)}, previous.astype(np.float32).astype(np.float64)
    else:
        moment = {n: jnp.asarray(previous.mean(axis), jnp.float32) for n, axis in (("v_row", -1), ("v_col", -2))}
        theirs = tuple(np.asarray(x, np.float64) * shape[axis] for x, axis in zip(moment.values(), (-1, -2)))
    updates, after = one_step(p, g, moment, t, dict(zip(names, values)), constant_decay)
    theta, expected = reference.adalomo_step(p, g, theirs, t, lr, rule)
    assert_close(updates, theta - p)
    assert_close([after[name] for name in moment], jax.tree.leaves(reference.means(expected, shape)))


STACK_AXES = {"scalar": None, "bias": 0, "matrix": 1, "conv": -1}


@pytest.mark.parametrize("mask", [slow(None), matrices_only], ids=["decay all", "decay matrices"])
def test_each_layer_of_a_stack_is_a_tensor_of_its_own(mask: Any):
    layers = 3
    stacked = lambda trees: {
        name: trees[0][name] if axis is None else np.stack([t[name] for t in trees], axis)
        for name, axis in STACK_AXES.items()
    }
    params = [tree(100 * k, 4.0**k) for k in range(layers)]
    # Two steps: with layers of such different sizes, the rounding of a third may exceed the tolerance.
    grads = [[tree(100 * k + 10 * t, 3.0**k) for k in range(layers)] for t in (1, 2)]
    rules = {name: Adalomo(weight_decay=0.5 * (mask is None or len(TREE[name]) > 1)) for name in TREE}
    apart = [referenced(params[k], [g[k] for g in grads], [LR] * 2, rules) for k in range(layers)]
    expected = [stacked([trajectory[t] for trajectory in apart]) for t in range(2)]
    options: Any = {"weight_decay": 0.5, "weight_decay_mask": mask}
    run = lambda tx: ours(tx, stacked(params), [stacked(g) for g in grads])
    assert_close(run(adalomo(LR, **options, layer_axes=STACK_AXES)), expected)
    assert_close(run(adalomo(LR, **options, layer_axes=lambda params: STACK_AXES)), expected)
    assert_close(run(per_layer(adalomo(LR, **options), STACK_AXES)), expected)
    assert_apart(run(adalomo(LR, **options)), expected)


def test_scale_by_adalomo_is_the_rule_without_the_parameters():
    params, g = tree(0), tree(10)
    updates, _ = jax.jit(scale_by_adalomo().update)(g, scale_by_adalomo().init(params))
    expected = referenced(params, [g], [1.0], {name: Adalomo(min_param_rms=0.0) for name in TREE})[0]
    sizes = {name: reference.root_mean_square(p) for name, p in params.items()}
    assert_close(updates, {name: (params[name] - expected[name]) / sizes[name] for name in TREE})


def test_scale_by_adalomo_takes_layers_apart():
    g = np.stack([gaussian((4, 5), 0), gaussian((4, 5), 1, 100.0)])
    one, stacked = scale_by_adalomo(), scale_by_adalomo(layer_axes=0)
    update, update_stacked = jax.jit(one.update), jax.jit(stacked.update)
    apart: Any = [update(g_i, one.init(g_i))[0] for g_i in g]
    expected = np.stack(apart)
    assert_close(update_stacked(g, stacked.init(g))[0], expected)
    assert_apart(update(g, one.init(g))[0], expected)


def test_scale_by_param_rms_equals_optax():
    params, g = tree(0), tree(10)
    params["bias"], params["scalar"] = params["bias"] * 0, np.asarray(params["scalar"])
    theirs, ours = optax.scale_by_param_block_rms(1e-3), scale_by_param_rms(1e-3)
    update, update_theirs = jax.jit(ours.update), jax.jit(theirs.update)
    assert_close(update(g, ours.init(params), params)[0], update_theirs(g, theirs.init(params), params)[0])


@functools.cache
def compiled_update(stacked: bool) -> Any:
    return jax.jit(adalomo(LR, weight_decay=0.5, layer_axes=STACK_AXES if stacked else None).update)


@pytest.mark.parametrize(
    ("dtype", "axes"),
    [("float16", None), ("bfloat16", STACK_AXES), ("float64", None), ("float32", STACK_AXES)]
    + [slow("float16", STACK_AXES), slow("bfloat16", None), slow("float64", STACK_AXES), slow("float32", None)],
    ids=lambda x: x if isinstance(x, str) else "apart" if x is None else "stacked",
)
def test_moments_are_float32_and_the_update_is_rounded_once(dtype: str, axes: Any):
    with jax.enable_x64(dtype == "float64"):
        tx = adalomo(LR, weight_decay=0.5, layer_axes=axes)
        params, g = jax.tree.map(lambda x: jnp.asarray(x, dtype), (tree(0), tree(10)))
        update = compiled_update(axes is not None)
        updates, after = update(g, tx.init(params), params)
        for state in [tx.init(params), after, scale_by_adalomo(layer_axes=axes).init(params)]:
            assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
        exact_params, exact_g = jax.tree.map(lambda x: x.astype(jnp.float32), (params, g))
        expected, _ = update(exact_g, tx.init(exact_params), exact_params)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        assert_close(updates, expected, dtype)


def test_zero_gradients_move_nothing_and_zero_weights_can_move():
    params, g = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(3)}, {"w": jnp.ones((3, 4)), "b": jnp.zeros(3)}
    tx = adalomo(LR)
    updates, _ = jax.jit(tx.update)(g, tx.init(params), params)
    assert_close(updates, {"w": np.full((3, 4), -LR * 1e-3), "b": np.zeros(3)})


@pytest.mark.parametrize("constants, message", [
    ({"b2": 1.0}, r"b2 must be at least 0 and less than 1, got 1\.0"),
    ({"b2": -0.1}, r"b2 must be at least 0 and less than 1, got -0\.1"),
    ({"decay_rate": 0}, r"decay_rate must be above 0 and finite, got 0"),
    ({"decay_rate": -0.8}, r"decay_rate must be above 0 and finite, got -0\.8"),
    ({"clipping_threshold": 0.0}, r"clipping_threshold must be above 0 and finite, got 0\.0"),
    ({"eps": 0.0}, r"eps must be above 0 and finite, got 0\.0"),
])  # fmt: skip
def test_a_constant_out_of_its_range_is_refused(constants: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        adalomo(LR, **constants)
    with pytest.raises(ValueError, match=message):
        scale_by_adalomo(**constants)


@pytest.mark.parametrize(
    "options", [{}, {"layer_axes": 0}, {"weight_decay": 0.1}], ids=["plain", "stacked", "weight_decay"]
)
def test_missing_parameters_are_refused(options: dict[str, Any]):
    tx, g = adalomo(LR, **options), jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params\)"):
        tx.update(g, tx.init(g))
    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params\)"):
        scale_by_param_rms().update(g, optax.EmptyState())


@pytest.mark.parametrize("scale", [1.0, 1e5, 1e12])
def test_a_row_without_gradients_does_not_spoil_the_others(scale: float):
    """An embedding has such a row if a token is not in the batch: its statistics are 1e-30, the others' up to 1e24."""
    p, g = jnp.ones((4, 3)), scale * jnp.ones((4, 3)).at[1].set(0.0)
    updates = np.asarray(jax.jit(adalomo(1e-2).update)(g, adalomo(1e-2).init(p), p)[0])
    assert np.all(updates[1] == 0.0)
    np.testing.assert_allclose(updates[[0, 2, 3]], -1e-2 * np.ones((3, 3)), rtol=1e-6)


def test_zero_gradients_are_finite_whatever_eps_has_been_rounded_to():
    p = jnp.ones((2, 3), jnp.float16)
    tx = optax.inject_hyperparams(adalomo)(learning_rate=1e-2)
    updates = np.asarray(jax.jit(tx.update)(jnp.zeros_like(p), tx.init(p), p)[0])
    assert np.all(updates == 0.0)
