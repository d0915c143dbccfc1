"""A step trains weights that are kept in int8 or 24 bits: its numbers, what stays as it is, and its memory."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import RULES, copied
from compiled import memory_of, tree_bytes
from language_model import batch, init_params, layer, make_loss, normalize
from lists_of_layers import MODELS, data, fuse_lists
from tiers import slow

from adalomo_jax import Int8, adalomo, float24, floats, fuse, int8, lomo
from adalomo_jax.optimizers.kept import is_kept

BLOCK = 8
IS_MATRIX = lambda path: any(name in path for name in ("mix", "up", "down"))
ENCODE: dict[str, Any] = {
    "int8": functools.partial(int8, block=BLOCK, where=IS_MATRIX),
    "bf16+8": functools.partial(float24, where=IS_MATRIX),
    "int8 everywhere": functools.partial(
        int8, block=BLOCK, where=lambda path: "norm" not in path and "scale" not in path
    ),
}
LOSSES = {
    "scan": make_loss(),
    "cast": lambda params, tokens: make_loss()(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), tokens),
    "second axis": lambda params, tokens: make_loss()(
        {
            name: jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), x) if "layers" in name else x
            for name, x in params.items()
        },
        tokens,
    ),
}
BATCHES = [batch(seed, batch_size=4) for seed in range(3)]


def params_of(loss="scan", dtype=jnp.float32):
    params = init_params(3, dtype=dtype)
    if loss == "second axis":
        params["layers0"] = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), params["layers0"])
    return params


@functools.cache
def trained(form, *, loss="scan", rule="adalomo", unfused=False, dtype=jnp.float32, **options):
    """The result after three steps."""
    step = fuse(LOSSES[loss], RULES[rule], **options)
    axis = -1 if loss == "second axis" else -2
    encode = ENCODE[form] if form == "bf16+8" else functools.partial(ENCODE[form], axis=axis)
    params = step.place(encode(params_of(loss, dtype)), BATCHES[0])
    state, run = step.init(params, BATCHES[0]), jax.jit(step.unfused) if unfused else step.jit
    for tokens in BATCHES:
        result = run(params, state, tokens)
        params, state = result.params, result.state
    return result


def parts(tree):
    """The weights that are kept in another form."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_kept) if is_kept(x)]


def units(w):
    """The distance between neighbours on the grid of each weight."""
    if isinstance(w, Int8):
        return np.asarray(w.scales, np.float32)
    return 2.0**-15 * np.abs(np.asarray(w.floats()))


def assert_equal_but_for_rounding(a, b, share=0.01):
    """Sums in another order may move a weight to the next value of its grid, seldom."""
    assert len(parts(a)) == len(parts(b)) >= 3
    for x, y in zip(parts(a), parts(b)):
        difference = np.abs(np.asarray(x.floats()) - np.asarray(y.floats()))
        assert np.mean(difference > 0) <= share
        assert np.all(difference <= 2 * np.maximum(units(x), units(y)).max())
    chex.assert_trees_all_close(floats(a)["norm"], floats(b)["norm"], rtol=1e-3)


def differing(a, b):
    """The share of int8 values that differ."""
    pairs = list(zip(parts(a), parts(b), strict=True))
    return max(float(np.mean(np.asarray(x.values) != np.asarray(y.values))) for x, y in pairs)


CASES = [
    ("bf16+8", {"loss": "cast"}),
    slow("int8 everywhere", {"microbatches": 2, "max_grad_norm": 0.1}),
    slow("int8", {}),
    slow("int8", {"offload": ("params", "activations")}),
    slow("int8", {"loss": "second axis"}),
    slow("int8", {"loss": "cast", "rule": "adamw"}),
    slow("int8", {"dtype": jnp.bfloat16}),
    slow("int8 everywhere", {"rule": "sgd with momentum"}),
    slow("bf16+8", {"offload": ("params", "activations"), "microbatches": 2}),
    slow("int8", {"stochastic_rounding": False, "loss_scale": 256.0}),
    slow("bf16+8", {"rule": "lomo", "microbatches": 2}),
]


@pytest.mark.parametrize(("form", "options"), CASES)
def test_equals_the_unfused_step(form, options):
    fused, unfused = (trained(form, unfused=u, **options) for u in (False, True))
    share = 0.05 if options.get("loss") == "cast" or "dtype" in options else 0.01
    assert_equal_but_for_rounding(fused.params, unfused.params, share)
    np.testing.assert_allclose(fused.loss, unfused.loss, 1e-3)


def test_int8_equals_the_unfused_step_and_the_comparison_sees_other_keys():
    params = trained("int8").params
    assert_equal_but_for_rounding(params, trained("int8", unfused=True).params)
    with pytest.raises(AssertionError):
        assert_equal_but_for_rounding(params, trained("int8", unfused=True, seed=1).params)


def test_equals_plain_optax_on_the_layers_apart():
    """Rounded to nearest, each layer is what Optax's update of its floats, added to them, is nearest to on its grid."""
    loss_fn, tx = make_loss(), optax.adamw(3e-2)
    params = ENCODE["int8"](init_params(3))
    step = fuse(loss_fn, tx, stochastic_rounding=False)
    result = step.jit(*copied((params, step.init(params, BATCHES[0]))), BATCHES[0])
    grads = jax.grad(loss_fn)(floats(params), BATCHES[0])
    for name in ("mix", "up", "down"):
        w, new = params["layers0"][name], result.params["layers0"][name]
        for i in range(3):
            of_layer: Any = jax.tree.map(lambda part, i=i: part[i], w)
            update, _ = tx.update(grads["layers0"][name][i], tx.init(of_layer.floats()), of_layer.floats())
            exact = np.asarray(of_layer.floats(), np.float64) + np.asarray(update, np.float64)
            scales = np.repeat(np.asarray(new.scales[i], np.float64), new.values.shape[-2], axis=0)
            assert np.all(np.abs(np.asarray(new.floats()[i]) - exact) <= 0.501 * scales)
        assert np.mean(np.asarray(new.values != w.values)) > 0.5


def test_what_is_not_finite_is_not_written():
    loss_of: Any = make_loss()
    loss_fn = lambda params, x: loss_of(params, BATCHES[0]) + jnp.sum(params["layers0"]["up"][1]) * x
    step = fuse(loss_fn, adalomo(1e-2))
    params = ENCODE["int8"](init_params(3))
    result = step.jit(*copied((params, step.init(params, jnp.float32(1)))), jnp.float32(jnp.nan))
    assert bool(result.metrics["skipped"])
    chex.assert_trees_all_equal(result.params, params)
    step = fuse(
        lambda params, x: loss_of(params, BATCHES[0]) + jnp.sum(jnp.sqrt(params["layers0"]["up"][1] * x)),
        lomo(1e-3),
    )
    result = step.jit(*copied((params, step.init(params, jnp.float32(1)))), jnp.float32(0))
    assert int(result.metrics["unwritten"]) == 1
    new, old = result.params["layers0"], params["layers0"]
    chex.assert_trees_all_equal(new["up"], old["up"])
    assert np.any(np.asarray(new["down"].values != old["down"].values))


@pytest.mark.slow
def test_frozen_weights_keep_every_bit():
    """Adapters are trained beside frozen int8 weights, with the numbers that they have beside the floats of these."""

    def loss_fn(params, tokens):
        x = params["base"]["embed"][tokens]

        def body(x, w):
            base, a, b = w
            return layer(x, base | {"up": base["up"] + a @ b}), None

        x, _ = jax.lax.scan(jax.checkpoint(body), x, (params["base"]["layers0"], params["a"], params["b"]))
        logits = normalize(x, params["base"]["norm"]) @ params["base"]["embed"].T
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])

    rng = np.random.default_rng(0)
    adapters = {"a": jnp.asarray(rng.normal(size=(3, 16, 2)), jnp.float32), "b": jnp.zeros((3, 2, 24))}
    base = ENCODE["int8"](init_params(3, tied=True))
    results = []
    for frozen in (base, floats(base)):
        params = {"base": frozen} | adapters
        step = fuse(loss_fn, optax.adamw(1e-2), trainable=lambda path: path in ("a", "b"))
        state = step.init(params, BATCHES[0])
        params = copied(params)
        for tokens in BATCHES:
            params, state, *_ = step.jit(params, state, tokens)
        results.append(params)
    chex.assert_trees_all_equal(results[0]["base"], base)
    chex.assert_trees_all_close(*({name: r[name] for name in ("a", "b")} for r in results), rtol=1e-5)
    assert not np.allclose(results[0]["b"], 0)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["encode", "place"])
def test_layers_in_a_list(first):
    found = MODELS["plain, remat layer"]()
    step = fuse_lists(found.loss_fn, adalomo(1e-2))
    encode = functools.partial(int8, block=4, where=lambda path: path.endswith(("up", "down")))
    if first == "encode":
        params = step.place(encode(found.params), *data(0))
    else:
        params = encode(step.place(found.params, *data(0)))
    plan = step.plan(params, *data(0))
    stacks = {leaf.path: leaf for leaf in plan.leaves if leaf.layer_paths}
    assert stacks.keys() == found.stacks.keys() and stacks["layers/0/up"].form == "int8"
    assert "float32 in int8" in str(plan)
    list_of = step.unplace(params)
    chex.assert_trees_all_equal(list_of, encode(found.params))
    state = step.init(params, *data(0))
    result = step.jit(*copied((params, state)), *data(0))
    unfused = jax.jit(step.unfused)(params, state, *data(0))
    assert differing(result.params, unfused.params) <= 0.01 < differing(result.params, params)
    np.testing.assert_allclose(jax.jit(step.loss)(params, *data(0)), found.loss_fn(floats(list_of), *data(0)), 1e-5)


@pytest.mark.slow
def test_a_layer_in_another_form_stays_by_itself():
    found = MODELS["plain, remat layer"]()
    params = int8(found.params, block=4, where=lambda path: path.endswith("up") and "layers/3" not in path)
    step = fuse_lists(found.loss_fn, adalomo(1e-2))
    plan = step.plan(step.place(params, *data(0)), *data(0))
    assert next(leaf for leaf in plan.leaves if leaf.path == "layers/3/up").layers is None
    assert "layers/3/up is kept as floats" in str(plan) or "kept as int8 in blocks of 4" in str(plan)


@pytest.mark.parametrize(
    ("loss", "microbatches"), [("scan", 2), slow("cast", None), slow("second axis", None), slow("second axis", 2)]
)
def test_the_loss_alone(loss, microbatches):
    step = fuse(LOSSES[loss], adalomo(1e-2), microbatches=microbatches)
    params = int8(params_of(loss), block=BLOCK, axis=-1, where=IS_MATRIX)
    rtol = 1e-2 if loss == "cast" else 1e-5
    np.testing.assert_allclose(jax.jit(step.loss)(params, BATCHES[0]), LOSSES[loss](floats(params), BATCHES[0]), rtol)


@pytest.mark.slow
def test_the_loss_alone_returns_aux():
    step = fuse(make_loss(aux=True), adalomo(1e-2), has_aux=True)
    params = ENCODE["int8"](init_params(3))
    found, expected = jax.jit(step.loss)(params, BATCHES[0]), make_loss(aux=True)(floats(params), BATCHES[0])
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_state_is_that_of_the_floats():
    step = fuse(make_loss(), optax.contrib.schedule_free_adamw(1e-2))  # which keeps the parameters, too
    params = init_params(3)
    of_floats = step.init(floats(ENCODE["int8"](params)), BATCHES[0])
    of_kept = step.init(ENCODE["int8"](params), BATCHES[0])
    chex.assert_trees_all_equal(of_floats.inner, of_kept.inner)
    abstract = step.abstract_state(ENCODE["int8"](jax.eval_shape(lambda: params)), BATCHES[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, of_kept)


def test_blocks_across_layers_are_refused():
    params = params_of("second axis")
    step = fuse(LOSSES["second axis"], adalomo(1e-2))
    with pytest.raises(
        ValueError, match=r"'layers0/down' is kept as int8 in blocks of 3 along axis -2.*int8\(params, axis=-1"
    ):
        step.init(ENCODE["int8"](params), BATCHES[0])


@pytest.mark.slow
def test_weights_that_a_step_has_used_are_named():
    step = fuse(make_loss(), adalomo(1e-2))
    params = copied(ENCODE["int8"](init_params(3)))
    state = step.init(params, BATCHES[0])
    result = step.jit(params, state, BATCHES[0])
    with pytest.raises(ValueError, match=r"params\['layers0'\]\['down'\].values was given to an earlier step"):
        step.jit(result.params | {"layers0": params["layers0"]}, result.state, BATCHES[0])


@pytest.mark.uncached
@pytest.mark.parametrize("form", ["int8", slow("bf16+8")])
def test_no_floats_of_a_stack_exist(form):
    """Temporaries do not grow with the layers, and the stacks are updated in place."""

    def temporaries(layers):
        params = ENCODE[form](jax.eval_shape(lambda: init_params(layers, dim=64, hidden=256, tied=True)))
        step = fuse(make_loss(), lomo(1e-2))
        sizes = step.jit.lower(params, step.abstract_state(params, BATCHES[0]), BATCHES[0]).compile().memory_analysis()
        assert sizes.output_size_in_bytes - sizes.alias_size_in_bytes < 1000  # all but the loss and the metrics
        return sizes.temp_size_in_bytes

    one_layer = tree_bytes(init_params(1, dim=64, hidden=256, tied=True)["layers0"])
    saved = 4 * BATCHES[0].size * 64
    assert temporaries(24) - temporaries(4) < 20 * (saved + 0.05 * one_layer)


@pytest.mark.slow
def test_layers_after_blocks_on_the_first_axis():
    """The layer axis lies behind the axis of the blocks: a layer is then described anew."""
    loss = lambda params, x: jnp.mean(
        jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.moveaxis(params, 1, 0))[0]
    )
    params, x = (
        int8(jnp.asarray(np.random.default_rng(0).normal(size=(16, 3, 16)), jnp.float32), axis=-3),
        jnp.ones((2, 16)),
    )
    step = fuse(loss, adalomo(1e-2))
    state = step.init(params, x)
    results = [run(*copied((params, state)), x) for run in (step.jit, jax.jit(step.unfused))]
    chex.assert_trees_all_equal(results[0].params, results[1].params)
    np.testing.assert_allclose(jax.jit(step.loss)(params, x), loss(floats(params), x), 1e-5)


@pytest.mark.slow
@pytest.mark.uncached
def test_layers_in_a_list_are_decoded_one_at_a_time():
    """Under checkpoints in the step, and in any case for the loss alone."""

    def temporaries(layers, only_loss):
        layer = jax.checkpoint(lambda x, w: x + jnp.tanh(x @ w))
        layer = (lambda x, w: x + jnp.tanh(x @ w)) if only_loss else layer

        def loss(params, x):
            for w in params:
                x = layer(x, w)
            return jnp.mean(x**2)

        params = int8([jax.ShapeDtypeStruct((256, 256), jnp.float32)] * layers, where=lambda path: True)
        x = jax.ShapeDtypeStruct((4, 256), jnp.float32)
        step = fuse(loss, lomo(1e-2), roll=False)
        if only_loss:
            return memory_of(jax.jit(step.loss).lower(params, x).compile()).temp_size_in_bytes
        return memory_of(step.jit.lower(params, step.abstract_state(params, x), x).compile()).temp_size_in_bytes

    for only_loss in (False, True):
        assert temporaries(12, only_loss) - temporaries(6, only_loss) < 0.5 * 4 * 256 * 256
