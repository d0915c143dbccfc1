"""The fused step equals the unfused one."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import RELATIVE_ERROR, RULES, copied, relative_error, run_both
from language_model import REMATS, batch, init_params, make_loss
from small_model import small_loss, small_params
from tiers import always, slow

from adalomo_jax import adalomo, fuse, lomo

BATCHES = [(batch(i),) for i in range(10)]
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 10)


def is_matrix(params):
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def labels(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "layer" if "layers" in str(path[0]) else "other", params)


OTHER_RULES = {
    "adalomo with decay and schedule": adalomo(SCHEDULE, weight_decay=0.1, weight_decay_mask=is_matrix),
    "adalomo with b2": adalomo(1e-2, b2=0.99),
    "lomo with clipping": lomo(SCHEDULE, clip_value=1e-3, weight_decay=0.1),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=8),
    "lion": optax.lion(1e-3),
    "chain": optax.chain(optax.clip(1e-2), optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-1e-3)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE),
    "masked": optax.chain(optax.masked(optax.add_decayed_weights(0.1), is_matrix), adalomo(1e-2)),
    "multi_transform": optax.multi_transform({"layer": adalomo(1e-2), "other": optax.adamw(1e-3)}, labels),
}


def assert_equal(loss_fn, tx, params, **options):
    fused, unfused = run_both(loss_fn, tx, params, BATCHES, **options)
    assert relative_error(fused, unfused) < RELATIVE_ERROR
    assert relative_error(fused.params, params) > 100 * RELATIVE_ERROR  # training moved them
    return fused


@pytest.mark.parametrize(
    ("rule", "remat"),
    [("sgd with momentum", "dots saved"), slow("adamw", "no remat"), slow("lomo", "everything saved")]
    + [slow(rule, "remat") for rule in RULES]
    + [slow("adalomo", remat) for remat in REMATS if remat != "remat"],
)
def test_equals_the_unfused_step(rule, remat):
    assert_equal(make_loss(remat), RULES[rule], init_params(4))


@functools.cache
def one_step():
    params, tokens = small_params(), batch()
    step = fuse(functools.partial(small_loss, aux=True), adalomo(1e-2), has_aux=True)
    return jax.jit(step)(params, step.init(params, tokens), tokens)


@functools.cache
def one_gradient():
    return jax.jit(jax.value_and_grad(functools.partial(small_loss, aux=True), has_aux=True))(small_params(), batch())


@pytest.mark.parametrize("rule", always(OTHER_RULES, ["lomo with clipping", "multi_transform"]))
def test_equals_the_unfused_step_for_any_leafwise_transformation(rule):
    assert_equal(small_loss, OTHER_RULES[rule], small_params())


@pytest.mark.parametrize("rule", ["adalomo", slow("adamw")])
def test_tied_embeddings(rule):
    assert_equal(make_loss(), RULES[rule], init_params(4, tied=True))


@pytest.mark.slow
def test_several_stacks():
    assert_equal(small_loss, adalomo(1e-2), small_params([4, 1, 3]))


def test_loss_inside_jit():
    assert_equal(jax.jit(small_loss), adalomo(1e-2), small_params())


def test_unrolled_scan():
    assert_equal(functools.partial(small_loss, unroll=2), adalomo(1e-2), small_params())


def test_checkpoint_around_the_scan():
    def loss_fn(params, tokens):
        layer = lambda x, w: (jnp.tanh(x @ w["mix"]) * w["scale"], None)
        x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers0"])
        return jnp.mean((x * params["norm"] - 1) ** 2)

    assert_equal(jax.checkpoint(loss_fn), adalomo(1e-2), small_params())


def test_aux():
    fused = assert_equal(functools.partial(small_loss, aux=True), adalomo(1e-2), small_params(), has_aux=True)
    assert set(fused.aux) == {"outputs", "mean"}


def test_aux_and_loss_are_those_before_the_update():
    result, (expected, _) = one_step(), one_gradient()
    assert relative_error((result.loss, result.aux), expected) < RELATIVE_ERROR


def test_metrics_hold_the_gradient_norm():
    expected = optax.tree.norm(one_gradient()[1])
    np.testing.assert_allclose(one_step().metrics["grad_norm"], expected, rtol=1e-5)


@pytest.mark.parametrize("rule", always(RULES, ["adalomo"]))
def test_equals_optax_on_the_layers_apart(rule):
    """The fused step also equals gradients and updates written out layer by layer, for three steps."""
    tx, params = RULES[rule], init_params(3)
    step = fuse(make_loss(), tx)
    now, state = params, step.init(params, *BATCHES[0])
    layers = [jax.tree.map(lambda x, i=i: x[i], params["layers0"]) for i in range(3)]
    apart = params | {"layers0": layers}
    kept = tx.init(apart)

    @jax.jit
    def step_apart(apart, kept, tokens):
        stacked = lambda p: p | {"layers0": jax.tree.map(lambda *x: jnp.stack(x), *p["layers0"])}
        grads = jax.grad(lambda p: make_loss()(stacked(p), tokens))(apart)
        updates, kept = tx.update(grads, kept, apart)
        return optax.apply_updates(apart, updates), kept

    for args in BATCHES[:3]:
        now, state, *_ = step.jit(*copied((now, state)), *args)
        apart, kept = step_apart(apart, kept, *args)
    layers = [jax.tree.map(lambda x, i=i: x[i], now["layers0"]) for i in range(3)]
    assert relative_error(now | {"layers0": layers}, apart) < RELATIVE_ERROR


def test_a_stack_is_not_one_tensor():
    """The comparison above fails for statistics over the whole stack, which `tx` alone would use."""
    params, tx = small_params(), adalomo(1e-2)
    updates, _ = jax.jit(tx.update)(one_gradient()[1], tx.init(params), params)
    assert relative_error(one_step().params, optax.apply_updates(params, updates)) > 10 * RELATIVE_ERROR


def test_the_comparison_sees_one_layer_that_is_not_updated():
    params, result = small_params(), one_step()
    stale = jax.tree.map(lambda new, old: new.at[1].set(old[1]), result.params["layers0"], params["layers0"])
    assert relative_error(result.params | {"layers0": stale}, result.params) > 10 * RELATIVE_ERROR


def test_the_comparison_sees_what_is_not_finite():
    with pytest.raises(AssertionError):
        relative_error({"a": jnp.array([jnp.nan])}, {"a": jnp.ones(1)})


def test_the_state_moves_between_fused_and_unfused():
    params = small_params()
    step = fuse(small_loss, adalomo(1e-2))
    state = step.init(params, *BATCHES[0])
    kinds = [jax.jit(step), jax.jit(step.unfused)]
    ends = []
    for order in ([0, 1, 0, 1], [1, 1, 0, 0]):
        now = params, state
        for kind, args in zip(order, BATCHES):
            result = kinds[kind](*now, *args)
            now = result.params, result.state
        ends.append(now)
    assert relative_error(*ends) < RELATIVE_ERROR


@pytest.mark.slow
def test_counts_and_hyperparameters_stay_scalars():
    params = small_params()
    step = fuse(small_loss, OTHER_RULES["inject_hyperparams"])
    state = step.init(params, *BATCHES[0])
    result = jax.jit(step)(params, state, *BATCHES[0])
    assert result.state.inner.hyperparams["learning_rate"].shape == ()
    counts = [count for _, count in optax.tree.get_all_with_path(result.state.inner, "count")]
    assert len(counts) >= 2 and all(count.shape == () and int(count) == 1 for count in counts)
    assert int(result.state.count) == 1


def test_one_trace_however_many_steps():
    params = small_params()
    traces = []

    def loss_fn(params, tokens):
        traces.append(None)
        return small_loss(params, tokens)

    step = fuse(loss_fn, adalomo(1e-2))
    state = step.init(params, *BATCHES[0])
    assert len(traces) == 1
    for args in BATCHES:
        result = step.jit(params, state, *args)
        params, state = result.params, result.state
    assert len(traces) == 2 and step.jit.jitted._cache_size() == 1


def test_init_takes_shapes():
    params, tokens = small_params(), batch()
    step = fuse(small_loss, adalomo(1e-2))
    expected = step.init(params, tokens)
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    chex.assert_trees_all_equal(step.init(params, shapes(tokens)), expected)
    chex.assert_trees_all_equal(step.init(shapes(params), shapes(tokens)), expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(step.init, params, tokens), expected)


def test_jit_donates_and_call_does_not():
    params, tokens = small_params(), batch()
    step = fuse(small_loss, adalomo(1e-2))
    state = step.init(params, tokens)
    jax.jit(step)(params, state, tokens)
    assert not params["embed"].is_deleted()
    step.jit(params, state, tokens)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))


def test_parameters_that_the_loss_does_not_read_decay():
    params = small_params() | {"unread": jnp.ones((3, 4))}
    fused, unfused = run_both(small_loss, adalomo(1e-2, weight_decay=0.5), params, BATCHES[:2])
    assert relative_error(fused, unfused) < RELATIVE_ERROR
    assert float(jnp.max(fused.params["unread"])) < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", slow("float64")])
def test_with_64_bit_types(dtype):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(dtype), small_params())
        fused, unfused = run_both(small_loss, adalomo(1e-2), params, [(batch().astype(jnp.int32),)])
    assert fused.params["embed"].dtype == dtype
    assert relative_error(fused, unfused) < RELATIVE_ERROR


def test_runs_without_jit():
    loss_fn = lambda params, x: jnp.sum(jax.lax.scan(lambda c, w: (jnp.sin(c * w), None), x, params)[0])
    params, x = jnp.ones((3, 2)), jnp.ones(2)
    step = fuse(loss_fn, lomo(1e-2))
    eager, jitted = (f(params, step.init(params, x), x) for f in (step, jax.jit(step)))
    assert relative_error(eager, jitted) < RELATIVE_ERROR


def test_a_loss_that_is_its_parameter():
    fused, unfused = run_both(lambda p: p, lomo(1.0), jnp.float32(3.0), [()])
    assert relative_error(fused, unfused) == 0.0 and float(fused.params) == 2.0


def test_a_loss_without_arguments_or_layers():
    fused, unfused = run_both(lambda p: jnp.sum(p["w"] ** 2), adalomo(1e-2), {"w": jnp.ones((3, 2))}, [()] * 3)
    assert relative_error(fused, unfused) < RELATIVE_ERROR


@pytest.mark.slow
def test_stacks_that_are_read_in_another_order_than_they_are_named():
    """The step updates them in halves, by the order in which a layer reads them."""
    shapes = {"a": (4, 8), "b": (8, 4), "c": (4,), "d": (4, 6), "e": (6, 4)}
    random = np.random.default_rng(0)
    layers = [{k: jnp.asarray(random.normal(size=s) / 3, jnp.float32) for k, s in shapes.items()} for _ in range(3)]
    stacked, x = jax.tree.map(lambda *xs: jnp.stack(xs), *layers), jnp.ones((2, 4))
    body = lambda h, p: jnp.tanh(jnp.tanh(jnp.tanh(h @ p["d"]) @ p["e"] * p["c"]) @ p["a"]) @ p["b"]

    def of_list(layers):
        h = x
        for p in layers:
            h = body(h, p)
        return jnp.mean(h**2)

    tx = adalomo(1e-2)
    step = fuse(lambda p: jnp.mean(jax.lax.scan(lambda h, p: (body(h, p), None), x, p)[0] ** 2), tx, rms_metrics=True)
    state, of_layers, rms = step.init(stacked), tx.init(layers), []

    @jax.jit
    def by_optax(layers, state):
        moved, state = tx.update(jax.grad(of_list)(layers), state, layers)
        rms = jax.tree.map(lambda u: jnp.sqrt(jnp.mean(jnp.square(u))), moved)
        return optax.apply_updates(layers, moved), state, rms

    for _ in range(3):
        layers, of_layers, rms = by_optax(layers, of_layers)
        stacked, state, *_, metrics = step.jit(stacked, state)
    assert relative_error(stacked, jax.tree.map(lambda *xs: jnp.stack(xs), *layers)) < RELATIVE_ERROR
    for k in shapes:
        np.testing.assert_allclose(metrics["update_rms"][k], [layer[k] for layer in rms], rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"microbatches": 2}], ids=str)
def test_without_layers_it_is_the_unfused_step_itself(options):
    step = fuse(lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2), adalomo(1e-2), **options)
    args = jnp.ones([8, 4]), step.init(jnp.ones([8, 4]), jnp.ones([2, 8])), jnp.ones([2, 8])
    assert str(jax.make_jaxpr(step)(*args)) == str(jax.make_jaxpr(step.unfused)(*args))


def test_a_loss_that_is_a_scan_alone_is_fused():
    def loss_fn(ws):
        return jax.lax.scan(lambda x, w: (jnp.sum(jnp.tanh(x * w)), None), jnp.ones([]), ws)[0]

    step, ws = fuse(loss_fn, adalomo(1e-2)), jnp.ones([3, 8, 4])
    plan = step.plan(ws)
    assert plan.updates_early and plan.gradient_bytes == ws[0].nbytes
    state = step.init(ws)
    assert str(jax.make_jaxpr(step)(ws, state)) != str(jax.make_jaxpr(step.unfused)(ws, state))
    chex.assert_trees_all_close(step(ws, state).params, step.unfused(ws, state).params, rtol=1e-6)
