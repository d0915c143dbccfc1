"""A step's metrics are the values that it computed."""

import apart
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import RULES
from language_model import batch, init_params, make_loss
from tiers import slow

from adalomo_jax import fuse

TOKENS = batch(batch_size=4)
OPTIONS = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5},
    "microbatches": {"microbatches": 2},
    "scaled": {"loss_scale": 256.0},
}


def run(rule, twin="fused", params=None, **options):
    params = init_params(3) if params is None else params
    step = fuse(make_loss(), RULES[rule], **options)
    return jax.jit(step if twin == "fused" else step.unfused)(params, step.init(params, TOKENS), TOKENS)


@pytest.mark.parametrize(
    ("options", "twin"),
    [slow("clipped", "unfused"), *((o, "fused") if o == "clipped" else slow(o, "fused") for o in OPTIONS)],
)
def test_the_loss_and_the_norm_of_the_gradient(options, twin):
    loss, grads = jax.jit(jax.value_and_grad(make_loss()))(init_params(3), TOKENS)
    metrics = run("lomo", twin, **OPTIONS[options]).metrics
    assert set(metrics) == {"loss", "grad_norm", "skipped", "unwritten"}
    np.testing.assert_allclose([metrics["loss"], metrics["grad_norm"]], [loss, optax.tree.norm(grads)], rtol=1e-5)
    assert not metrics["skipped"] and metrics["unwritten"] == 0


def rms(x, axes=None):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64)), axis=axes))


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("adalomo", "plain"),
        slow("lomo", "clipped"),
        slow("lomo", "microbatches"),
        slow("lomo", "plain"),
        slow("lomo", "scaled"),
    ],
)
def test_rms_of_updates_and_parameters_per_layer(rule, options):
    """Plain Optax makes the expected updates on separate layers, from gradients by `jax.grad`."""
    params, most = init_params(3), OPTIONS[options].get("max_grad_norm")
    tx = RULES[rule] if most is None else optax.chain(optax.clip_by_global_norm(most), RULES[rule])
    layers = apart.unstack(params)

    @jax.jit
    def updates_of(layers):
        grads = jax.grad(lambda p: make_loss()(apart.stack(p), TOKENS))(layers)
        return tx.update(grads, tx.init(layers), layers)[0]

    updates = apart.stack(updates_of(layers))
    found = run(rule, rms_metrics=True, **OPTIONS[options]).metrics
    for metric, tree in (("update_rms", updates), ("param_rms", params)):
        expected = {}
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            expected[name] = rms(x, tuple(range(1, x.ndim)) if name.startswith("layers") else None)
        assert found[metric].keys() == expected.keys()
        for name, value in expected.items():
            assert found[metric][name].shape == value.shape
            np.testing.assert_allclose(found[metric][name], value, rtol=2e-5, atol=1e-12)


def test_layers_differ_so_that_their_order_is_seen():
    found = run("lomo", rms_metrics=True).metrics
    for metric, name in (("update_rms", "layers0/mix"), ("param_rms", "layers0/up")):
        assert np.min(np.abs(np.diff(np.sort(found[metric][name])))) > 1e-3 * np.max(found[metric][name])


def test_rms_is_of_the_trained_only_and_of_parameters_before_the_step():
    params = init_params(3) | {"unread": jnp.full((2, 2), 3.0)}
    fused, unfused = (
        run("adamw", twin, params, rms_metrics=True, trainable=lambda path: path in ("unread", "layers0/up"))
        for twin in ("fused", "unfused")
    )
    assert set(fused.metrics["param_rms"]) == {"unread", "layers0/up"}
    assert fused.metrics["param_rms"]["unread"] == 3.0 and np.all(fused.params["unread"] != 3.0)
    for metric in ("update_rms", "param_rms"):
        for name, value in fused.metrics[metric].items():
            np.testing.assert_allclose(value, unfused.metrics[metric][name], rtol=1e-5)


def test_float16_weights_are_measured_in_float32():
    params = {"w": jnp.full((2, 8), 300.0, jnp.float16)}  # their squares overflow float16
    step = fuse(lambda p: jnp.sum(p["w"].astype(jnp.float32)), RULES["lomo"], rms_metrics=True)
    metrics = jax.jit(step)(params, step.init(params)).metrics
    assert metrics["param_rms"]["w"] == 300.0 and metrics["param_rms"]["w"].dtype == jnp.float32
