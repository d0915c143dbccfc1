"""`loss_scale` keeps float16 gradients in range, and each layer's update unscales them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import RELATIVE_ERROR, RULES, relative_error, run_both
from language_model import batch, init_params, make_loss
from small_model import small_loss, small_params
from tiers import slow

from adalomo_jax import adalomo, fuse, lomo
from adalomo_jax.fused.loss_scale import DynamicLossScale, LossScaleState

BATCHES = [(batch(i),) for i in range(3)]
TWINS = pytest.mark.parametrize("twin", ["fused", "unfused"])
X = jnp.linspace(0.5, 1.0, 8, dtype=jnp.float16).reshape(2, 4)


@pytest.mark.parametrize(
    ("rule", "options"),
    [slow("adalomo", {}), ("adamw", {"max_grad_norm": 0.5}), ("lomo", {"microbatches": 2})],
    ids=str,
)
def test_a_power_of_two_changes_nothing_in_float32(rule, options):
    params, results = small_params(3), []
    for scale in (None, 1024.0):
        step = fuse(small_loss, RULES[rule], loss_scale=scale, **options)
        results.append(jax.jit(step)(params, step.init(params, *BATCHES[0]), *BATCHES[0]))
    plain, scaled = results
    assert relative_error(scaled, plain) < 1e-6


def test_it_does_multiply_the_loss_that_is_differentiated():
    """The gradients overflow at a scale near the end of float32. Otherwise the test above would check nothing."""
    params = init_params(3)
    step = fuse(lambda p, tokens: 100 * make_loss()(p, tokens), RULES["lomo"], loss_scale=3e38)
    assert jax.jit(step)(params, step.init(params, *BATCHES[0]), *BATCHES[0]).metrics["unwritten"] > 0


def half_params():
    w = 0.4 * np.random.default_rng(0).standard_normal((3, 4, 4))
    return {"head": jnp.full((4,), 2.0**-6, jnp.float16), "layers": jnp.asarray(w, jnp.float16)}


def small_gradients(params, x):
    """The gradients are about 2 ** -30, too small for float16."""
    y, _ = jax.lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, params["layers"])
    return jnp.sum((y * jnp.float16(2.0**-12)) @ params["head"] * jnp.float16(2.0**-12)).astype(jnp.float32)


@pytest.mark.parametrize(
    ("scale", "twin"),
    [(2.0**15, "fused"), (DynamicLossScale(2.0**15), "unfused")]
    + [slow(2.0**15, "unfused"), slow(DynamicLossScale(2.0**15), "fused")],
    ids=lambda x: x if isinstance(x, str) else "static" if isinstance(x, float) else "dynamic",
)
def test_gradients_that_underflow_without_a_scale(scale, twin):
    params, found = half_params(), {}
    for used in (None, scale):
        step = fuse(small_gradients, RULES["lomo"], loss_scale=used, trainable=lambda path: path == "layers")
        run = jax.jit(step if twin == "fused" else step.unfused)
        found[used] = float(run(params, step.init(params, X), X).metrics["grad_norm"])
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    gradient = jax.grad(lambda layers: small_gradients(wide | {"layers": layers}, X.astype(jnp.float32)))
    expected = float(optax.tree.norm(gradient(wide["layers"])))
    assert found[None] == 0.0 < expected
    assert abs(found[scale] - expected) < 0.01 * expected


def test_weights_move_where_they_would_not():
    moved, params = [], half_params()
    for scale in (None, 2.0**15):
        step = fuse(small_gradients, adalomo(1e-2), loss_scale=scale, trainable=lambda path: path == "layers")
        result = jax.jit(step)(params, step.init(params, X), X)
        moved.append(float(jnp.mean(result.params["layers"] != params["layers"])))
    assert moved[0] == 0.0 and moved[1] > 0.9


@pytest.mark.parametrize(
    ("rule", "scale"),
    [("adalomo", DynamicLossScale(1024.0)), ("adamw", 1024.0)]
    + [slow(rule, DynamicLossScale(1024.0)) for rule in ("lomo", "sgd with momentum")],
    ids=lambda x: x if isinstance(x, str) else "static" if isinstance(x, float) else "dynamic",
)
def test_state_and_parameters_keep_their_dtypes(rule, scale):
    params = small_params(2, dtype=jnp.float16)
    step = fuse(small_loss, RULES[rule], loss_scale=scale)
    state = step.init(params, *BATCHES[0])
    for run in (step, step.unfused):
        result = jax.eval_shape(run, params, state, *BATCHES[0])
        chex.assert_trees_all_equal_shapes_and_dtypes(result.params, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(result.state, state)
    kept = [x.dtype for x in jax.tree.leaves(step.init(params, *BATCHES[0]).inner) if x.ndim > 1]
    assert rule != "adamw" or set(kept) == {jnp.dtype(jnp.float16)}


@pytest.mark.parametrize("most", [slow(None), 0.5])
def test_equals_the_unfused_step(most):
    options = {"loss_scale": DynamicLossScale(growth_interval=2), "max_grad_norm": most}
    fused, unfused = run_both(small_loss, RULES["adamw"], small_params(3), BATCHES, **options)
    assert relative_error(fused, unfused) < RELATIVE_ERROR
    assert float(fused.state.loss_scale.scale) == 2.0**16


def large_gradients(params, x):
    """The gradients are about 2 ** 4: they overflow with a scale of 2 ** 14, but not with 2 ** 11."""
    y, _ = jax.lax.scan(lambda c, w: (c + jnp.tanh(c @ w), None), x, params["layers"])
    return jnp.sum(y @ params["head"] * jnp.float16(16.0)).astype(jnp.float32)


@pytest.mark.parametrize(
    ("most", "twin"), [(None, "fused"), slow(1.0, "unfused"), slow(1.0, "fused"), slow(None, "unfused")]
)
def test_the_scale_halves_until_gradients_are_finite_and_grows_again(most, twin):
    params = half_params() | {"head": jnp.ones(4, jnp.float16)}
    scale = DynamicLossScale(2.0**14, growth_interval=2)
    step = fuse(large_gradients, adalomo(1e-4), loss_scale=scale, max_grad_norm=most)
    run = jax.jit(step if twin == "fused" else step.unfused)
    state, scales, finite = step.init(params, X), [], []
    for _ in range(12):
        before = params, state
        params, state, _, _, metrics = run(params, state, X)
        scales.append(float(metrics["loss_scale"]))
        finite.append(metrics["unwritten"] == 0)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state.inner)))
        if not finite[-1]:
            chex.assert_trees_all_equal((params, state.inner), (before[0], before[1].inner))
        assert bool(metrics["skipped"]) == (not finite[-1])
    assert not finite[0] and sum(finite) >= 4
    assert state.skipped == 12 - sum(finite)
    for i in range(11):
        if not finite[i]:
            assert scales[i + 1] == scales[i] / 2
        elif i and finite[i - 1] and scales[i - 1] == scales[i]:
            assert scales[i + 1] == 2 * scales[i]
        else:
            assert scales[i + 1] == scales[i]


@TWINS
def test_steps_in_which_nothing_was_written_did_not_happen(twin):
    """Adam's count and a schedule stay while the scale is searched for. Then the first step is Optax's first."""
    params = half_params() | {"head": jnp.ones(4, jnp.float16)}
    rate = lambda count: jnp.where(count < 1, 2.0**-6, 1.0)
    tx = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(rate))
    step = fuse(large_gradients, tx, loss_scale=DynamicLossScale(2.0**13), stochastic_rounding=False)
    run, state, skipped = jax.jit(step if twin == "fused" else step.unfused), step.init(params, X), 0
    while (result := run(params, state, X)).metrics["unwritten"] > 0:
        assert result.state.count == result.state.inner[0].count == 0
        chex.assert_trees_all_equal((result.params, result.state.inner), (params, state.inner))
        params, state, skipped = result.params, result.state, skipped + 1
    assert skipped >= 2 and result.state.count == result.state.inner[0].count == 1
    # Adam's first step moves each weight by the learning rate, whatever its gradient is.
    for new, old in zip(jax.tree.leaves(result.params), jax.tree.leaves(params)):
        np.testing.assert_allclose(jnp.abs(new.astype(jnp.float32) - old.astype(jnp.float32)), 2.0**-6, rtol=0.02)


def test_dynamic_loss_scale_by_itself():
    scale = DynamicLossScale(8.0, growth_interval=3, factor=4.0, smallest=1.0, largest=64.0)
    state, seen = scale.init(), []
    for finite in [True, True, False, True, True, True, True, True, True, True, True, True, False, False, False, False]:
        state = scale.update(state, jnp.array(finite))
        seen.append((float(state.scale), int(state.finite_steps)))
    grown = [(2, 1), (2, 2), (8, 0), (8, 1), (8, 2), (32, 0), (32, 1), (32, 2), (64, 0)]
    assert seen == [(8, 1), (8, 2), (2, 0), *grown, (16, 0), (4, 0), (1, 0), (1, 0)]


def test_the_state_of_a_dynamic_loss_scale():
    state = DynamicLossScale().init()
    assert isinstance(state, LossScaleState)
    assert state.scale.dtype == jnp.float32 and state.finite_steps.dtype == jnp.int32
    chex.assert_trees_all_equal_shapes_and_dtypes(DynamicLossScale().update(state, jnp.array(True)), state)
    step = fuse(lambda p: jnp.sum(p), lomo(1.0), loss_scale=8.0)
    assert step.init(jnp.ones(2)).loss_scale is None
