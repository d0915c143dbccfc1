"""`microbatches` gives the gradient of the whole batch with the activations of a part and no tree of gradients."""

import functools
from typing import Any

import apart
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import RELATIVE_ERROR, RULES, relative_error, run_both
from compiled import memory_of
from jax.lax import scan
from language_model import batch, init_params, make_loss
from tiers import slow

from adalomo_jax import fuse, lomo

BATCHES = [(batch(i, batch_size=8),) for i in range(3)]
X = jnp.sin(jnp.arange(32.0)).reshape(8, 4)
W = jnp.asarray(np.float32(0.3) * np.random.default_rng(0).standard_normal((5, 4, 4), np.float32))
PARAMS = {"w": W, "b": jnp.linspace(0.5, 1.0, 4), "s": jnp.linspace(0.5, 1.0, 5), "u": W[:3] + 0.1}
EXACT = lomo(1.0)  # subtracts the gradient itself
KEEPS = optax.trace(decay=0.0)  # its state is the gradient that it was given


@pytest.mark.parametrize(("rule", "m"), [("adalomo", 2), slow("adamw", 1), slow("adamw", 8)])
def test_equals_optax_on_the_whole_batch(rule, m):
    params, tx = init_params(3), RULES[rule]
    results = apart.run_fused(fuse(make_loss(), tx, microbatches=m), params, BATCHES)
    expected, _, norms = apart.train(make_loss(), tx, params, BATCHES)
    assert relative_error(results[-1].params, expected) < 3 * RELATIVE_ERROR
    np.testing.assert_allclose(apart.norms_of(results), norms, rtol=1e-5)
    np.testing.assert_allclose(results[0].loss, jax.jit(make_loss())(params, *BATCHES[0]), rtol=1e-6)


def test_the_comparison_sees_a_microbatch_left_out():
    params, (tokens,) = init_params(3), BATCHES[0]
    whole, part = (apart.train(make_loss(), RULES["adamw"], params, [(t,)])[0] for t in (tokens, tokens[:6]))
    assert relative_error(whole, part) > 30 * RELATIVE_ERROR


@pytest.mark.slow
def test_equals_the_unfused_step():
    fused, unfused = run_both(
        make_loss("no remat"), RULES["adamw"], init_params([3, 2], tied=True), BATCHES, microbatches=4
    )
    assert relative_error(fused, unfused) < RELATIVE_ERROR


@pytest.mark.parametrize("most", [slow(0.5), slow(100.0)])
def test_with_clipping(most):
    """The step clips the gradient of the whole batch, not that of each microbatch."""
    params, tx = init_params(3), RULES["lomo"]
    results = apart.run_fused(fuse(make_loss(), tx, microbatches=4, max_grad_norm=most), params, BATCHES)
    chained = optax.chain(optax.clip_by_global_norm(most), tx)
    expected, _, norms = apart.train(make_loss(), chained, params, BATCHES)
    assert relative_error(results[-1].params, expected) < RELATIVE_ERROR
    np.testing.assert_allclose(apart.norms_of(results), norms, rtol=1e-5)


def regularized(p, x):
    c, _ = scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])
    return jnp.mean(c**2) + 0.1 * jnp.sum(p["b"] ** 2) + 0.01 * sum(jnp.sum(p[name] ** 2) for name in ("s", "u"))


def a_scan_over_what_no_batch_reaches(p, x):
    made, _ = scan(lambda c, w: (jnp.tanh(c @ w), None), jnp.eye(4) * p["b"], p["u"])
    return jnp.mean(scan(lambda c, w: (jnp.tanh(c @ w), None), x @ made, p["w"])[0] ** 2)


def carry_that_no_batch_reaches(p, x):
    body = lambda c, w: ((jnp.tanh(c[0] @ w + c[1]), c[1] * jnp.mean(w) + p["b"]), None)
    (y, z), _ = scan(body, (x, p["b"]), p["w"])
    return jnp.mean(y**2) + jnp.sum(z)


def carry_that_begins_the_same_for_all(p, x):
    return jnp.mean(scan(lambda c, w: (jnp.tanh(c @ w + x), None), jnp.broadcast_to(p["b"], x.shape), p["w"])[0] ** 2)


def encoder_decoder(p, x):
    memory, _ = scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["u"])
    return jnp.mean(scan(lambda c, w: (jnp.tanh(c @ w + memory * p["b"]), None), x, p["w"])[0] ** 2)


def ys_in_the_loss(p, x):
    c, ys = scan(lambda c, w: (jnp.tanh(c @ w), c * p["b"]), x, p["w"])
    return jnp.mean(c) + jnp.mean(jnp.sum(ys, axis=0) ** 2)


def ys_that_no_batch_reaches(p, x):
    c, ys = scan(lambda c, w: (jnp.tanh(c @ w), jnp.sum(w * p["b"])), x, p["w"])
    return jnp.mean(c) + jnp.sum(ys**2)


def differentiable_xs(p, x):
    fed = jnp.einsum("bd,l->lbd", x, jnp.cumsum(p["s"]))
    body = lambda c, a: (jnp.tanh(c @ a[0] * a[1] + a[2]), None)
    return jnp.mean(scan(body, x * p["b"], (p["w"], jax.nn.softmax(p["s"]), fed))[0] ** 2)


def a_loss_without_the_batch_in_it(p, x):
    return jnp.sum(scan(lambda c, w: (jnp.tanh(c @ w), None), p["b"], p["w"])[0])


def cast_and_transposed_before_the_scan(p, x):
    return jnp.mean(scan(lambda c, w: (jnp.tanh(c @ w), None), x, jnp.swapaxes(p["w"], 1, 2) * 0.5)[0] ** 2)


LOSSES = [
    regularized,
    a_scan_over_what_no_batch_reaches,
    carry_that_no_batch_reaches,
    carry_that_begins_the_same_for_all,
    encoder_decoder,
    ys_in_the_loss,
    ys_that_no_batch_reaches,
    differentiable_xs,
    a_loss_without_the_batch_in_it,
    cast_and_transposed_before_the_scan,
]


@pytest.mark.parametrize(
    ("loss_fn", "most"),
    [
        (f, 1e-6) if f in (carry_that_no_batch_reaches, a_loss_without_the_batch_in_it) else slow(f, 1e-6)
        for f in LOSSES[:-1]
    ]
    + [
        (LOSSES[-1], None),
        slow(LOSSES[-1], 1e-6),
        *(slow(f, None) for f in (regularized, encoder_decoder, differentiable_xs)),
    ],
    ids=lambda x: x.__name__.replace("_", " ") if callable(x) else str(x),
)
def test_equals_the_mean_over_microbatches_of_jax_grad(loss_fn, most):
    """These losses are means over the batch, so this is the gradient of the whole batch."""
    step = fuse(loss_fn, KEEPS, microbatches=4, max_grad_norm=most)
    result = jax.jit(step)(PARAMS, step.init(PARAMS, X), X)
    of_whole = lambda p: jnp.mean(jnp.stack([loss_fn(p, x) for x in X.reshape(4, 2, 4)]))
    loss, grads = jax.jit(jax.value_and_grad(of_whole))(PARAMS)
    np.testing.assert_allclose(loss, loss_fn(PARAMS, X), rtol=1e-5)
    norm = optax.tree.norm(grads)
    assert most is None or norm > 2 * most
    expected = jax.tree.map(lambda g: g if most is None else g * (most / norm), grads)
    assert relative_error(result.state.inner.trace, expected) < 2 * RELATIVE_ERROR
    np.testing.assert_allclose([result.loss, result.metrics["grad_norm"]], [loss, norm], rtol=1e-5)


def test_a_sum_over_the_batch():
    loss_fn = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"][0]) ** 2)
    loss, grads = jax.value_and_grad(loss_fn)(PARAMS, X)
    for step, factor in (
        (fuse(loss_fn, EXACT, microbatches=4, reduction="sum"), 1.0),
        (fuse(loss_fn, EXACT, microbatches=4), 0.25),
    ):
        result = jax.jit(step)(PARAMS, step.init(PARAMS, X), X)
        expected = jax.tree.map(lambda p, g, factor=factor: p - factor * g, PARAMS, grads)
        assert relative_error((result.params, result.loss), (expected, factor * loss)) < RELATIVE_ERROR


@pytest.mark.parametrize("twin", ["fused", "unfused"])
def test_arguments_that_are_not_sliced_nested_batches_and_aux(twin):
    def loss_fn(p, key, batch, scale):
        noise = jax.random.normal(key, (4,))
        y, _ = scan(lambda c, w: (jnp.tanh(c @ w) + noise, None), batch["in"]["x"], p["w"])
        return scale * jnp.mean((y - batch["y"]) ** 2), {"y": y, "first": batch["in"]["x"][0], "scale": scale}

    args = jax.random.key(3), {"in": {"x": X}, "y": jnp.cos(X)}, jnp.float32(2.0)
    step = fuse(loss_fn, EXACT, has_aux=True, microbatches=4, batch_argnums=2)
    run = step if twin == "fused" else step.unfused
    result = jax.jit(run)(PARAMS, step.init(PARAMS, *args), *args)
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(PARAMS, *args)
    expected = jax.tree.map(lambda p, g: p - g, PARAMS, grads)
    assert relative_error((result.params, result.loss), (expected, loss)) < RELATIVE_ERROR
    expected_aux = {"y": aux["y"].reshape(4, 2, 4), "first": X[::2], "scale": jnp.full(4, 2.0)}
    assert relative_error(result.aux, expected_aux) < RELATIVE_ERROR


@pytest.mark.parametrize("name", ["w", "b", "c"])
def test_bfloat16_gradients_are_summed_in_float32(name):
    """In bfloat16 one large term plus many small ones stays at the large one. `tx` writes 64 times the gradient."""
    s = jnp.asarray([1.0] + [2.0**-9] * 255, jnp.bfloat16)

    def loss_fn(p, s):
        y, _ = scan(lambda y, w: (y + jnp.sum(w * s[0] + p["c"] * s[0]), None), jnp.bfloat16(0.0), p["w"])
        return y + jnp.sum(p["b"] * s[0])

    shapes = {"w": (2, 3), "b": (3,), "c": (3,)}
    params = {name: jnp.zeros(shape, jnp.bfloat16) for name, shape in shapes.items()}
    tx = optax.stateless(lambda g, _: jax.tree.map(lambda g: jnp.round(64 * g.astype(jnp.float32)), g))
    step = fuse(loss_fn, tx, microbatches=256, reduction="sum", stochastic_rounding=False)
    result = jax.jit(step)(params, step.init(params, s), s)
    exact = (2 if name == "c" else 1) * (1 + 255 / 512)
    naive = jax.lax.scan(lambda total, x: (total + x, None), jnp.bfloat16(0.0), s)[0]
    assert float(naive) == 1.0 < exact
    np.testing.assert_array_equal(result.params[name].astype(jnp.float32), round(64 * exact))


DIM, HIDDEN, LENGTH = 64, 128, 16
LAYER_INPUT = 2 * LENGTH * DIM * 4  # bytes for a microbatch of two sequences
LAYER_WEIGHTS = 4 * (DIM + DIM * DIM + 2 * DIM * HIDDEN)


@functools.cache
def temporaries(layers, m, *, unfused=False, unrolled=False, **options):
    params = init_params(layers, dim=DIM, hidden=HIDDEN)
    tokens = batch(batch_size=2 * (m or 1), length=LENGTH)
    loss_fn = apart.unrolled_loss if unrolled else make_loss()
    step = fuse(loss_fn, lomo(1e-2), microbatches=m, **options)
    params = apart.unstack(params) if unrolled else params
    jitted = jax.jit(step.unfused, donate_argnums=(0, 1)) if unfused else step.jit
    return memory_of(jitted.lower(params, step.init(params, tokens), tokens).compile()).temp_size_in_bytes


DEPTHS = {False: (4, 16), True: (2, 8)}
"""The depths, by whether the layers are unrolled: unrolled layers take long to compile."""


@pytest.mark.slow
@pytest.mark.uncached
@pytest.mark.parametrize(("unrolled", "most"), [(False, 1.0), (True, None), (False, None), (True, 1.0)])
def test_no_gradient_tree(unrolled, most):
    """Temporaries exceed those of one microbatch alone, or of fewer layers, only by what the layers save."""
    shallow, deep = DEPTHS[unrolled]
    few, many = (temporaries(n, 4, unrolled=unrolled, max_grad_norm=most) for n in (shallow, deep))
    assert many - few <= 1.1 * 4 * (deep - shallow) * LAYER_INPUT < (deep - shallow) * LAYER_WEIGHTS
    alone = temporaries(deep, None, unrolled=unrolled, max_grad_norm=most)
    one_layer_and_ends = 2 * LAYER_WEIGHTS + 2 * 2 * 4 * 32 * DIM
    assert many - alone <= 1.1 * 3 * deep * LAYER_INPUT + one_layer_and_ends < (deep - shallow) * LAYER_WEIGHTS


@pytest.mark.slow
@pytest.mark.uncached
@pytest.mark.parametrize("unrolled", [False, True])
def test_the_unfused_step_does_have_a_gradient_tree(unrolled):
    shallow, deep = DEPTHS[unrolled]
    few, many = (temporaries(n, 4, unfused=True, unrolled=unrolled) for n in (shallow, deep))
    assert many - few > (deep - shallow) * LAYER_WEIGHTS


ERRORS = {
    "not divided": (
        {"microbatches": 3},
        r"microbatches=3 must divide .* argument 1 of loss_fn\['x'\] has the shape \(8, 4\)",
    ),
    "a scalar": ({"microbatches": 2}, r"argument 2 of loss_fn has the shape \(\)\. Name the arguments to slice with"),
    "no such argument": ({"microbatches": 2, "batch_argnums": 3}, "argument 3 of loss_fn, .* but it was called with 2"),
    "a raw key": (
        {"microbatches": 2},
        r"would cut argument 2 of loss_fn in parts, a uint32\[2\], .* with batch_argnums",
    ),
    "a table": (
        {"microbatches": 2},
        r"but argument 1 of loss_fn\['x'\] has the shape \(8, 4\), and argument 2 of loss_fn has the shape \(4, 2\)\. "
        "Name the arguments to slice with batch_argnums",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_refuses_before_compiling(case):
    options: Any
    options, message = ERRORS[case]
    step = fuse(lambda p, batch, other: jnp.sum(other) * jnp.sum(batch["x"] @ p["w"][0]), EXACT, **options)
    others = {"a raw key": jax.random.PRNGKey(0), "a table": jnp.ones((4, 2))}
    args = {"x": X}, others.get(case, jnp.float32(1.0))
    with pytest.raises(ValueError, match=message):
        step.init(PARAMS, *args)
    with pytest.raises(ValueError, match=message):
        step.plan(PARAMS, *args)


@pytest.mark.parametrize("narrow", [jnp.bfloat16, slow(jnp.float16)])
def test_gradients_of_weights_that_are_cast_before_use_are_summed_in_float32(narrow):
    """The result is the sum of the microbatches' plain gradients, to float32's digits.

    The weights are sums of few powers of two, so no product in the model is rounded, in whatever order XLA adds.
    """
    params = jax.tree.map(lambda w: jnp.round(4 * w) / 4, {"w": 2 * W[:2], "head": 2 * W[0], "tied": 2 * W[1]})
    x = jnp.round(2 * X) / 2 * 2.0 ** -(jnp.arange(8)[:, None] // 2 * 3)  # sums that need more digits than each part

    def loss(p, x):
        p = jax.tree.map(lambda w: w.astype(narrow), p)
        h, _ = scan(lambda h, w: (h @ w, None), x.astype(narrow) @ p["tied"], p["w"])
        return jnp.mean((h @ p["head"] @ p["tied"]).astype(jnp.float32))

    gradient, step = jax.jit(jax.grad(loss)), fuse(loss, KEEPS, microbatches=4)
    of_each = [jax.tree.map(lambda g: np.asarray(g, np.float64), gradient(params, part)) for part in jnp.split(x, 4)]
    found = jax.jit(step)(params, step.init(params, x), x).state.inner.trace
    for name, gradients in {name: [g[name] for g in of_each] for name in params}.items():
        np.testing.assert_allclose(found[name], sum(gradients) / 4, rtol=2e-6, atol=1e-7, err_msg=name)


def test_a_sum_that_bfloat16_does_not_hold():
    """1 + 0.498046875 is 1.5 in bfloat16."""
    x = jnp.array([[1.0], [0.498046875]])
    step = fuse(lambda w, x: jnp.sum(x @ w.astype(jnp.bfloat16)), EXACT, microbatches=2, reduction="sum")
    result = jax.jit(step)(jnp.zeros((1, 1)), step.init(jnp.zeros((1, 1)), x), x)
    assert result.params.item() == -1.498046875
