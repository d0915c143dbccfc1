"""The step writes non-finite values neither to parameters nor to state."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from language_model import batch, init_params, make_loss
from tiers import slow

from adalomo_jax import adalomo, fuse

RULES = {"adalomo": adalomo(1e-2), "adamw": optax.adamw(1e-3)}
TWINS = pytest.mark.parametrize("twin", ["fused", "unfused"])
RULES_AND_TWINS = pytest.mark.parametrize(
    ("rule", "twin"),
    [("adalomo", "fused"), ("adamw", "unfused"), slow("adamw", "fused"), slow("adalomo", "unfused")],
)
X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
NAN = float("nan")


def small_params():
    w = jnp.asarray(np.float32(0.3) * np.random.default_rng(0).standard_normal((4, 4, 4), np.float32))
    return {"head": jnp.ones((4, 1)), "layers": {"root": jnp.ones((4, 4)), "w": w}}


def root_loss(params, x):
    """The loss is finite at ``root = 0``, but its derivative is not."""
    body = lambda x, layer: (jnp.tanh(x @ layer["w"]) + jnp.sqrt(layer["root"]), None)
    return jnp.mean(jax.lax.scan(body, x, params["layers"])[0] @ params["head"])


def start(loss_fn, rule, params, twin, *args, **options):
    """The jitted step, and the parameters and state after one finite step."""
    step = fuse(loss_fn, RULES[rule], **options)
    run = jax.jit(step if twin == "fused" else step.unfused)
    result = run(params, step.init(params, *args), *args)
    assert not result.metrics["skipped"] and result.metrics["unwritten"] == 0 and result.state.skipped == 0
    return run, result.params, result.state


def plant(params, *path, layer=None):
    """Puts NaN in the first entry of a leaf, or of one of its layers."""
    key, *rest = path
    if rest:
        return params | {key: plant(params[key], *rest, layer=layer)}
    x = params[key]
    return params | {key: x.at[(0,) * x.ndim if layer is None else (layer, *(0,) * (x.ndim - 1))].set(NAN)}


def assert_nothing_is_written(result, params, state):
    chex.assert_trees_all_equal(result.params, params)  # NaNs in the same places are equal
    chex.assert_trees_all_equal(result.state.inner, state.inner)
    assert result.state.count == state.count
    assert result.state.skipped == state.skipped + 1
    assert result.metrics["skipped"]


@pytest.mark.parametrize(
    ("rule", "most", "twin"),
    [("adamw", 1.0, "fused"), slow("adalomo", None, "unfused")]
    + [slow("adalomo", None, "fused"), slow("adamw", 1.0, "unfused")],
)
def test_a_loss_that_is_not_finite_leaves_all_as_it_is(rule, most, twin):
    tokens = batch()
    run, params, state = start(make_loss(), rule, init_params(4), twin, tokens, max_grad_norm=most)
    for *path, layer in (("layers0", "mix", 2), ("head", None), ("embed", int(tokens[0, 0]))):
        planted = plant(params, *path, layer=layer)
        result = run(planted, state, tokens)
        assert not np.isfinite(result.loss)
        assert_nothing_is_written(result, planted, state)
        assert result.metrics["unwritten"] == 4 * len(params["layers0"]) + len(["head", "norm", "embed"])
    assert not run(params, state, tokens).metrics["skipped"]


@RULES_AND_TWINS
def test_nan_in_the_data(rule, twin):
    run, params, state = start(root_loss, rule, small_params(), twin, X)
    result = run(params, state, X.at[1, 2].set(NAN))
    assert_nothing_is_written(result, params, state)
    again = run(result.params, result.state, X)  # training goes on as if that batch had not come
    chex.assert_trees_all_equal(again.params, run(params, state, X).params)
    assert again.state.skipped == 1 and again.state.count == state.count + 1


@RULES_AND_TWINS
def test_a_tensor_whose_gradient_is_not_finite_is_not_written_while_others_are(rule, twin):
    run, params, state = start(root_loss, rule, small_params(), twin, X)
    params["layers"]["root"] = params["layers"]["root"].at[2].set(0.0)
    result = run(params, state, X)
    assert np.isfinite(result.loss) and not np.isfinite(result.metrics["grad_norm"])
    assert not result.metrics["skipped"] and result.metrics["unwritten"] == 1
    assert result.state.skipped == 1 and result.state.count == state.count + 1
    is_root = lambda path: "root" in jax.tree_util.keystr(path)
    roots = 0
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(result[:2]), jax.tree.leaves((params, state))):
        is_used = new.shape[1:] != (1,)  # AdaLomo keeps such zeros in place of state that it does not use
        if new.ndim and is_used and "head" not in jax.tree_util.keystr(path):
            changed = [bool(np.any(new[i] != old[i])) for i in range(4)]
            assert changed == [True, True, not is_root(path), True]
            roots += is_root(path)
    assert roots == 1 + (2 if rule == "adamw" else 1)  # the parameter, and the rule's state for it
    assert np.all(result.params["head"] != params["head"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((result.params, result.state.inner)))


@RULES_AND_TWINS
def test_with_a_norm_such_a_layer_stops_the_whole_step(rule, twin):
    run, params, state = start(root_loss, rule, small_params(), twin, X, max_grad_norm=1.0)
    params["layers"]["root"] = params["layers"]["root"].at[2].set(0.0)
    result = run(params, state, X)
    assert np.isfinite(result.loss) and not np.isfinite(result.metrics["grad_norm"])
    assert_nothing_is_written(result, params, state)


@RULES_AND_TWINS
@pytest.mark.parametrize("most", [None, slow(1.0)])
def test_skip_nonfinite_false_writes_whatever_comes(rule, most, twin):
    run, params, state = start(root_loss, rule, small_params(), twin, X, max_grad_norm=most, skip_nonfinite=False)
    result = run(params, state, X.at[1, 2].set(NAN))
    assert np.isnan(result.params["layers"]["w"]).any() and np.isnan(result.params["head"]).any()
    assert not result.metrics["skipped"] and result.metrics["unwritten"] == 0
    assert result.state.skipped == 0 and result.state.count == state.count + 1


@TWINS
def test_microbatches_with_one_that_is_not_finite(twin):
    run, params, state = start(root_loss, "adamw", small_params(), twin, X, microbatches=2)
    assert_nothing_is_written(run(params, state, X.at[1, 2].set(NAN)), params, state)


HUGE = 1e21
"""Finite in float32, but its square is not."""


def huge_params():
    return {"w": jnp.linspace(0.5, 1.0, 12).reshape(3, 2, 2), "b": jnp.array([0.5, 1.0]), "h": jnp.eye(2)}


def huge_loss(params, x):
    """Its gradients have HUGE entries and small ones."""
    layer = lambda h, w: (h + jnp.sum(w * jnp.array([[HUGE, 1.0], [-2.0, 3e-3]])), None)
    total = jax.lax.scan(layer, x, params["w"])[0]
    of_others = {"b": jnp.array([HUGE, 1e-3]), "h": jnp.array([[2.0, 3.0], [0.0, 0.5]])}
    return total + sum(jnp.sum(params[name] * g) for name, g in of_others.items())


def gradients_in_64_bits():
    f32 = lambda x: np.float64(np.float32(x))
    of_w = np.broadcast_to(np.array([[f32(HUGE), 1.0], [-2.0, f32(3e-3)]]), (3, 2, 2))
    return {"w": of_w, "b": np.array([f32(HUGE), f32(1e-3)]), "h": np.array([[2.0, 3.0], [0.0, 0.5]])}


@TWINS
def test_a_finite_gradient_whose_square_is_beyond_float32_is_written(twin):
    params, step = huge_params(), fuse(huge_loss, optax.sgd(1e-21))
    result = jax.jit(step if twin == "fused" else step.unfused)(params, step.init(params, 0.0), 0.0)
    grads = gradients_in_64_bits()
    for name, x in params.items():
        expected = np.float64(x) - 1e-21 * grads[name]
        np.testing.assert_allclose(np.float64(result.params[name]), expected, rtol=1e-6)
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    np.testing.assert_allclose(np.float64(result.metrics["grad_norm"]), norm, rtol=1e-6)
    assert result.metrics["unwritten"] == 0 and not result.metrics["skipped"] and result.state.skipped == 0


@TWINS
@pytest.mark.parametrize("most", [2.0, 1e30])
def test_such_a_gradient_is_clipped_by_its_norm(twin, most):
    """`tx` sees the clipped gradient, whatever it keeps of it."""
    params, step = huge_params(), fuse(huge_loss, optax.trace(decay=0.0), max_grad_norm=most)
    run = jax.jit(step if twin == "fused" else step.unfused)
    result = run(params, step.init(params, 0.0), 0.0)
    grads = gradients_in_64_bits()
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    np.testing.assert_allclose(np.float64(result.metrics["grad_norm"]), norm, rtol=1e-6)
    for name, g in grads.items():
        np.testing.assert_allclose(np.float64(result.state.inner.trace[name]), g * min(1.0, most / norm), rtol=1e-5)
    assert result.metrics["unwritten"] == 0 and result.state.skipped == 0


@TWINS
@pytest.mark.parametrize("rule", RULES)
def test_moments_that_cannot_hold_it_stay_finite(rule, twin):
    """Without a norm to clip by, a rule that keeps squares would keep infinity: such tensors stay unchanged."""
    params, step = huge_params(), fuse(huge_loss, RULES[rule])
    result = jax.jit(step if twin == "fused" else step.unfused)(params, step.init(params, 0.0), 0.0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((result.params, result.state.inner)))
    assert result.metrics["unwritten"] == 3 + 1 and np.all(result.params["b"] == params["b"])
    assert np.any(result.params["h"] != params["h"])
