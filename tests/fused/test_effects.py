"""The side effects of a loss (prints, callbacks and checks) happen as they do without `fuse`."""

from collections import Counter

import apart
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify, io_callback
from jax.lax import scan
from tiers import slow

from adalomo_jax import adalomo, fuse, lomo

X = jnp.arange(16.0).reshape(4, 4) / 10
PARAMS = {"w": jnp.ones((3, 4, 4)) * jnp.array([0.1, 0.2, 0.3])[:, None, None], "b": jnp.linspace(0.5, 1.0, 4)}
OPTIONS = [{}, {"microbatches": 2}, {"max_grad_norm": 1.0}, {"microbatches": 2, "max_grad_norm": 1.0}]


def telling(calls, *, ordered):
    """A loss that calls back before, in and after its scan, with the batch, with weights and with nothing."""

    def tell(name, *values):
        note = lambda *values: calls.append((name, *(round(float(v), 5) for v in values)))
        jax.debug.callback(note, *values, ordered=ordered)

    def loss(params, x):
        tell("batch", x.mean())
        tell("weights", params["b"].mean())
        h = x * params["b"]

        def layer(h, w):
            tell("layer", w.mean())
            h = h + jnp.tanh(h @ w)
            tell("hidden", h.mean())
            return h, None

        h, _ = scan(layer, h, params["w"])
        tell("end")
        tell("out", h.mean())
        return jnp.mean(h**2)

    return loss


def calls_of(fn, calls, *args):
    calls.clear()
    jax.block_until_ready(jax.jit(fn)(*args))
    jax.effects_barrier()
    return list(calls)


@pytest.mark.parametrize(
    ("options", "ordered"),
    [(OPTIONS[0], True), (OPTIONS[-1], True), (OPTIONS[-1], False), slow(OPTIONS[1], True), slow(OPTIONS[2], True)],
)
def test_callbacks_are_those_of_the_loss(options, ordered):
    calls = []
    loss = telling(calls, ordered=ordered)
    slices = jnp.split(X, options.get("microbatches", 1))
    due = [calls_of(jax.value_and_grad(loss), calls, PARAMS, x) for x in slices]
    step = fuse(loss, lomo(0.1), **options)
    found = calls_of(step, calls, PARAMS, step.init(PARAMS, X), X)
    assert Counter(found) == sum(map(Counter, due), Counter())
    if ordered:
        for calls_of_one in due:
            rest = iter(found)
            assert all(call in rest for call in calls_of_one), "not in the order of the loss"


def test_what_is_the_same_in_each_layer_is_told_of_in_each():
    """The step calls back in each layer, as the loss itself does; JAX's gradient of the loss calls back once."""
    calls = []

    def loss(params, x):
        def layer(h, w):
            jax.debug.callback(lambda b: calls.append(float(b)), params["b"].mean())
            return h + jnp.tanh(h @ w), None

        return jnp.mean(scan(layer, x, params["w"])[0])

    due = calls_of(loss, calls, PARAMS, X)
    step = fuse(loss, lomo(0.1), trainable=lambda path: path == "w")
    assert due == [0.75] * 3 and calls_of(step, calls, PARAMS, step.init(PARAMS, X), X) == due


def test_results_of_callbacks_count():
    """Even those of weights can differ between microbatches, so each microbatch calls the callback."""
    calls = []

    def double(x):
        calls.append(float(x))
        return np.float32(2 * x)

    call = lambda x: io_callback(double, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(x))
    loss = lambda p, x: jnp.mean(scan(lambda h, w: (h + h @ w, None), x, p["w"])[0]) * call(p["b"].mean())
    expected = jax.grad(lambda p: jnp.mean(scan(lambda h, w: (h + h @ w, None), X, p["w"])[0]) * 1.5)(PARAMS)
    step = fuse(loss, lomo(1.0), microbatches=2)
    result = jax.jit(step)(PARAMS, step.init(PARAMS, X), X)
    np.testing.assert_allclose(PARAMS["w"] - result.params["w"], expected["w"], rtol=1e-5, atol=1e-6)
    assert calls == [0.75, 0.75]


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_checks_are_made(options):
    def loss(params, x):
        checkify.check(jnp.all(x >= 0), "negative: {}", x.min())

        def layer(h, w):
            h = h + jnp.tanh(h @ w)
            checkify.check(jnp.all(h < 9), "large")
            return h, None

        return jnp.mean(scan(layer, x * params["b"], params["w"])[0])

    step = fuse(loss, lomo(0.1), **options)
    state, checked = step.init(PARAMS, X), jax.jit(checkify.checkify(step))
    for factor, message in [(1.0, None), (-1.0, "negative"), (30.0, "large")]:
        error, result = checked(PARAMS, state, factor * X)
        assert message in error.get() if message else error.get() is None
        assert jnp.isfinite(result.loss)


def test_without_jit_updates_are_the_same():
    """`jax.disable_jit` turns a scan into a Python loop, in which layers are not tensors of their own."""
    loss = lambda p, x: jnp.mean(scan(lambda h, w: (h + jnp.tanh(h @ w), None), x * p["b"], p["layers"])[0] ** 2)
    params, tx = {"layers": PARAMS["w"], "b": PARAMS["b"]}, adalomo(1e-2)
    step = fuse(loss, tx, microbatches=2)
    with jax.disable_jit():
        result = step(params, step.init(params, X), X)
    expected, _, norms = apart.train(loss, tx, params, [(X,)])
    for name, want in expected.items():
        np.testing.assert_allclose(result.params[name], want, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(result.metrics["grad_norm"], norms[0], rtol=1e-5)
