"""Whatever a scan over layers looks like, the fused step equals the unfused one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import RELATIVE_ERROR, relative_error, run_both
from jax.lax import scan
from tiers import slow

from adalomo_jax import adalomo, fuse

X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
W = jnp.asarray(np.float32(0.3) * np.random.default_rng(0).standard_normal((5, 4, 4), np.float32))
BIAS, SCALES = jnp.linspace(0.5, 1.0, 4), jnp.linspace(0.5, 1.0, 5)


def plain(c, w):
    return jnp.tanh(c @ w), None


def ys_in_the_loss(p):
    c, ys = scan(lambda c, w: (jnp.tanh(c @ w), jnp.sum(c)), X, p["w"])
    return jnp.sum(c) + jnp.sum(ys**2)


def only_ys(p):
    return jnp.sum(scan(lambda c, w: (None, X @ w), None, p["w"])[1] ** 2)


def other_scanned_inputs(p):
    return jnp.sum(scan(lambda c, x: (jnp.tanh(c @ x[0] * x[1]), None), X, (p["w"], jnp.cumsum(p["s"])))[0])


def constants(p):
    """`b` is read before the scan, in it and after it."""
    y, _ = scan(lambda c, w: (jnp.tanh(c @ w + p["b"]), None), X * p["b"], p["w"])
    return jnp.sum((y * p["b"]) ** 2)


def integers_and_keys_in_the_carry(p):
    def body(c, w):
        x, i, key = c
        return (jnp.tanh(x @ w) * jax.random.uniform(jax.random.fold_in(key, i), (4,)), i + 1, key), None

    return jnp.sum(scan(body, (X, 0, jax.random.key(1)), p["w"])[0][0])


def keys_scanned_over(p):
    body = lambda c, x: (jnp.tanh(c @ x[0]) * jax.random.bernoulli(x[1], 0.8, (4,)), None)
    return jnp.sum(scan(body, X, (p["w"], jax.random.split(jax.random.key(0), 5)))[0])


def carry_that_does_not_feed_itself(p):
    return jnp.sum(scan(lambda c, w: ((jnp.tanh(X @ w), c[1] + jnp.sum(c[0])), None), (X * p["b"], 0.0), p["w"])[0][1])


def a_scan_in_the_body(p):
    return jnp.sum(scan(lambda c, w: (scan(plain, c, jnp.stack([w, w.T]))[0], None), X, p["w"])[0])


def a_branch_in_the_body(p):
    body = lambda c, w: (jax.lax.cond(jnp.sum(c) > 0, lambda c: jnp.tanh(c @ w), lambda c: c @ w, c), None)
    return jnp.sum(scan(body, X, p["w"])[0])


def stopped_gradients(p):
    return jnp.sum(scan(lambda c, w: (jnp.tanh(c @ w) + jax.lax.stop_gradient(jnp.sum(w)), None), X, p["w"])[0])


LOSSES = {
    "ys in the loss": ys_in_the_loss,
    "only ys": only_ys,
    "other scanned inputs": other_scanned_inputs,
    "constants": constants,
    "integers and keys in the carry": integers_and_keys_in_the_carry,
    "keys scanned over": keys_scanned_over,
    "a carry that does not feed itself": carry_that_does_not_feed_itself,
    "a scan in the body": a_scan_in_the_body,
    "a branch in the body": a_branch_in_the_body,
    "stopped gradients": stopped_gradients,
    "reversed and unrolled": lambda p: jnp.sum(scan(lambda c, w: (jnp.tanh(c @ w), c), X, p["w"], None, True, 2)[1]),
    "one stack twice": lambda p: jnp.sum(scan(lambda c, w: (jnp.tanh(c @ w[0]) @ w[1], None), X, (p["w"], p["w"]))[0]),
    "a custom_jvp function": lambda p: jnp.sum(scan(lambda c, w: (jax.nn.relu(c @ w + 0.1), None), X, p["w"])[0]),
    "mapped over the batch": lambda p: jnp.sum(jax.vmap(lambda x: scan(plain, x, p["w"])[0])(X) ** 2),
    "a gradient in the loss": lambda p: jnp.sum(jax.grad(lambda x: jnp.sum(scan(plain, x, p["w"])[0]))(X) ** 2),
}

SLOW = ["only ys", "keys scanned over", "a custom_jvp function", "stopped gradients", "a branch in the body"]
SLOW += ["constants", "other scanned inputs", "mapped over the batch", "a gradient in the loss"]
"""The other losses have something similar to these: ys in the loss, keys in the carry, a scan in the body."""


@pytest.mark.parametrize("name", [slow(name) if name in SLOW else name for name in LOSSES])
def test_equals_the_unfused_step(name):
    params = {"w": W, "b": BIAS, "s": SCALES}
    fused, unfused = run_both(LOSSES[name], adalomo(1e-2), params, [()] * 3)
    assert relative_error(fused, unfused) < RELATIVE_ERROR
    assert relative_error(fused.params["w"], W) > 100 * RELATIVE_ERROR


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "a gradient in the loss"])
def test_the_stack_is_updated_layer_by_layer(name):
    plan = fuse(LOSSES[name], adalomo(1e-2)).plan({"w": W, "b": BIAS, "s": SCALES})
    assert {leaf.path: leaf.layers for leaf in plan.leaves} == {"w": 5, "b": None, "s": None}


@pytest.mark.parametrize("axis", [1, 2])
def test_layers_on_another_axis(axis):
    """The result equals that of the same layers on the first axis."""
    w = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4, 4), np.float32) / 3)
    results = []
    for a in (0, axis):
        step = fuse(lambda p, a=a: jnp.sum(scan(plain, X, jnp.moveaxis(p["w"], a, 0))[0] ** 2), adalomo(1e-2))
        params = {"w": jnp.moveaxis(w, 0, a)}
        assert step.plan(params).leaves[0].axis == a
        state = step.init(params)
        for _ in range(2):
            params, state, *_ = step.jit(params, state)
        results.append(jnp.moveaxis(params["w"], a, 0))
    assert relative_error(results[1], results[0]) < RELATIVE_ERROR
    assert relative_error(results[0], w) > 100 * RELATIVE_ERROR


def test_mixed_dtypes_and_absent_leaves():
    params = {"w": W.astype(jnp.bfloat16), "s": jnp.ones((5, 4)), "empty": jnp.ones((5, 0)), "absent": None}

    def loss_fn(p):
        body = lambda c, w: (jnp.tanh(c @ w[0].astype(jnp.float32)) * w[1] + jnp.sum(w[2]), None)
        return jnp.sum(scan(body, X, (p["w"], p["s"], p["empty"]))[0])

    fused, unfused = run_both(loss_fn, adalomo(1e-2), params, [()])
    assert relative_error(fused, unfused) < RELATIVE_ERROR


def test_aux_may_return_parameters_and_outputs_of_scans():
    def loss_fn(p, scale):
        c, ys = scan(lambda c, w: (jnp.tanh(c @ w), c), X, p["w"])
        return scale * jnp.sum(c), (p, ys)

    fused, unfused = run_both(loss_fn, adalomo(1e-2), {"w": W}, [(2.0,)], has_aux=True)
    assert relative_error(fused, unfused) < RELATIVE_ERROR
    assert relative_error(fused.aux[0], {"w": W}) == 0.0
