"""adalomo and lomo do what Optax asks of every optimizer."""

from collections.abc import Callable
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiers import always, slow
from tolerances import assert_apart, assert_close

from adalomo_jax.optimizers import adalomo, lomo, scale_by_adalomo

LR = 0.1
AXES = {"head": None, "layers": 1, "norms": 0, "scalar": None}
ALL_AXES = {"head": -1, "layers": 0, "norms": 1, "scalar": None}
SHAPES = {"head": (4, 6), "layers": (4, 3, 5), "norms": (2, 6), "scalar": ()}
DTYPES = ["float16", "bfloat16", "float32", "float64"]

Make = Callable[..., optax.GradientTransformationExtraArgs]
OPTIMIZERS: dict[str, Make] = {
    "adalomo": adalomo,
    "adalomo b2": lambda lr, **kw: adalomo(lr, b2=0.9, **kw),
    "adalomo weight decay": lambda lr, **kw: adalomo(
        lr, weight_decay=0.1, weight_decay_mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params), **kw
    ),
    "adalomo layer axes": lambda lr, **kw: adalomo(lr, layer_axes=AXES, **kw),
    "adalomo callable layer axes, weight decay": lambda lr, **kw: adalomo(
        lr, layer_axes=lambda params: ALL_AXES, weight_decay=0.1, **kw
    ),
    "lomo": lomo,
    "lomo clip, weight decay": lambda lr, **kw: lomo(lr, clip_value=1.0, weight_decay=0.1, **kw),
}
SOME = ["adalomo", "adalomo callable layer axes, weight decay", "lomo clip, weight decay"]
"""The optimizers whose programs are compiled and run; the others run with ``-m slow``."""
some = pytest.mark.parametrize("name", always(OPTIMIZERS, SOME))


def tree(seed: int, dtype: Any = "float32") -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def types(tree: Any) -> Any:
    return jax.tree.map(jax.typeof, tree)


def types_of_shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.typeof(np.zeros(x.shape, x.dtype)), tree)


@some
def test_unknown_keyword_arguments_are_accepted(name: str):
    tx, params, g = OPTIMIZERS[name](LR), tree(0), tree(1)
    update = lambda **unknown: jax.eval_shape(lambda: tx.update(g, tx.init(params), params, **unknown))
    assert types_of_shapes(update(value=1.0, something_else=jnp.ones(3))) == types_of_shapes(update())


@some
def test_the_second_call_does_not_recompile(name: str):
    chex.clear_trace_counter()
    tx, params = OPTIMIZERS[name](lambda step: LR / (1.0 + step)), tree(0)
    step: Any = jax.jit(chex.assert_max_traces(lambda g, s, p: tx.update(g, s, p), n=1))
    state = tx.init(params)
    for seed in (1, 2, 3):
        updates, state = step(tree(seed), state, params)
        params = optax.apply_updates(params, updates)
    assert step._cache_size() == 1


@some
def test_map_params_works_on_the_state(name: str):
    tx, params = OPTIMIZERS[name](lambda step: LR), tree(0)
    state = tx.init(params)
    doubled = optax.tree.map_params(tx, lambda x: x + 1, state)
    marked = optax.tree.map_params(tx, lambda _: "of a parameter", state, transform_non_params=lambda _: "shared")
    of_params = jax.tree.map(lambda x, m: m == "of a parameter", state, marked)
    assert jax.tree.all(
        jax.tree.map(lambda x, is_of: is_of == (jnp.issubdtype(x.dtype, jnp.floating)), state, of_params)
    )
    assert_close(doubled, jax.tree.map(lambda x, is_of: x + is_of, state, of_params))


@some
@pytest.mark.parametrize("dtype", always(DTYPES, ["bfloat16", "float64"]))
def test_jit_and_abstract_init_give_the_same_types(name: str, dtype: str):
    with jax.enable_x64(dtype == "float64"):
        tx, params, g = OPTIMIZERS[name](lambda step: LR), tree(0, dtype), tree(1, dtype)
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        state = tx.init(params)
        assert types(state) == types(tx.init(shapes))
        for abstract in (jax.jit(tx.init).eval_shape(params), jax.eval_shape(tx.init, shapes)):
            assert types(state) == types_of_shapes(abstract)
        expected = types((g, state))
        assert types_of_shapes(jax.jit(tx.update).eval_shape(g, state, params)) == expected


@pytest.mark.parametrize(
    ("name", "dtype"),
    [slow("adalomo layer axes", "bfloat16"), ("lomo clip, weight decay", "float64")]
    + [slow("adalomo layer axes", dtype) for dtype in DTYPES if dtype != "bfloat16"]
    + [slow("lomo clip, weight decay", dtype) for dtype in DTYPES if dtype != "float64"],
)
def test_eager_gives_the_same_types(name: str, dtype: str):
    """The optimizer runs operation by operation, which is slow."""
    with jax.enable_x64(dtype == "float64"):
        tx, params, g = OPTIMIZERS[name](lambda step: LR), tree(0, dtype), tree(1, dtype)
        state = tx.init(params)
        assert types(tx.update(g, state, params)) == types((g, state))


@some
@pytest.mark.parametrize("dtype", always(DTYPES, ["float16", "float64"]))
def test_types_are_stable_under_cond(name: str, dtype: str):
    with jax.enable_x64(dtype == "float64"):
        tx, params, g = OPTIMIZERS[name](lambda step: LR), tree(0, dtype), tree(1, dtype)
        new, old = lambda s: tx.update(g, s, params), lambda s: (g, s)
        state = tx.init(params)
        after = jax.eval_shape(lambda s: jax.lax.cond(True, new, old, s), state)  # a difference raises while tracing
        assert types_of_shapes(after) == types((g, state))
        assert {x.dtype for x in jax.tree.leaves(state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}


@some
def test_a_constant_schedule_equals_a_float(name: str):
    rates = (LR, optax.constant_schedule(LR), optax.constant_schedule(2 * LR))
    update = lambda tx, g, params: tx.update(g, tx.init(params), params)[0]
    updates = jax.jit(lambda *args: [update(OPTIMIZERS[name](lr), *args) for lr in rates])(tree(1), tree(0))
    assert_close(updates[1], updates[0])
    assert_apart(updates[2], updates[0])


INJECTED: dict[str, tuple[Make, dict[str, Any]]] = {
    "adalomo": (adalomo, {"decay_rate": 0.8, "weight_decay": 0.1, "clipping_threshold": 0.9, "eps": 1e-30}),
    "adalomo b2": (adalomo, {"b2": 0.9, "min_param_rms": 0.01}),
    "adalomo layer axes": (adalomo, {"weight_decay": 0.1, "layer_axes": AXES}),
    "lomo": (lomo, {"clip_value": 0.5, "weight_decay": 0.1}),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("adalomo", "float32"),
        slow("adalomo b2", "bfloat16"),
        slow("adalomo layer axes", "bfloat16"),
        ("lomo", "bfloat16"),
    ]
    + [slow("adalomo", "bfloat16"), *(slow(name, "float32") for name in INJECTED if name != "adalomo")],
)
def test_injected_hyperparameters_change_nothing(name: str, dtype: str):
    make, options = INJECTED[name]
    static = ("layer_axes",) if "layer_axes" in options else ()
    plain = make(LR, **options)
    # Optax makes hyperparameters as narrow as the parameters unless it is told otherwise (optax#1414).
    injected = optax.inject_hyperparams(make, static_args=static, hyperparam_dtype=jnp.float32)(LR, **options)
    params, state, injected_state = tree(0, dtype), plain.init(tree(0, dtype)), injected.init(tree(0, dtype))
    update, injected_update = jax.jit(plain.update), jax.jit(injected.update)
    for seed in (1, 2):
        g = tree(seed, dtype)
        updates, state = update(g, state, params)
        injected_updates, injected_state = injected_update(g, injected_state, params)
        chex.assert_trees_all_close(cast(Any, injected_state).inner_state, state, rtol=1e-5)
        assert types(injected_updates) == types(updates)
        assert_close(injected_updates, updates, dtype)
    narrow = optax.inject_hyperparams(make, static_args=static)(LR, **options)
    updates, _ = jax.eval_shape(narrow.update, g, narrow.init(params), params)
    assert types_of_shapes(updates) == types(params)


@pytest.mark.parametrize("name", always(OPTIMIZERS, SOME[:1]))
def test_multi_steps_accumulates_over_four_gradients(name: str):
    params, grads = tree(0), [tree(seed) for seed in range(1, 5)]
    tx = OPTIMIZERS[name](LR)
    multi = optax.MultiSteps(tx, every_k_schedule=4)
    update, updates, state = jax.jit(multi.update), None, multi.init(params)
    for i, g in enumerate(grads):
        updates, state = update(g, state, params)
        assert i == 3 or not any(bool(jnp.any(u)) for u in jax.tree.leaves(updates))
    mean = jax.tree.map(lambda *gs: sum(gs) / 4, *grads)
    alone = jax.jit(tx.update)
    assert_close(updates, alone(mean, tx.init(params), params)[0], "float32")
    assert_apart(updates, alone(grads[-1], tx.init(params), params)[0], "float32")


def parabola(x: jax.Array) -> jax.Array:
    return jnp.sum((x - jnp.array([1.0, -1.0, 2.0])) ** 2)


def rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100.0 * (x[1] - x[0] ** 2) ** 2 + (1.0 - x[0]) ** 2)


def matrix_parabola(x: jax.Array) -> jax.Array:
    return jnp.sum((x - jnp.array([[1.0, 2.0], [3.0, -4.0]])) ** 2)


def mixed(x: tuple[jax.Array, ...]) -> jax.Array:
    return matrix_parabola(x[0]) + parabola(x[1]) + (x[2] - 3.0) ** 2


PROBLEMS: dict[str, Any] = {
    "parabola": parabola,
    "rosenbrock": rosenbrock,
    "matrix parabola": matrix_parabola,
    "mixed": mixed,
}
VECTOR, MATRIX = np.array([1.0, -1.0, 2.0]), np.array([[1.0, 2.0], [3.0, -4.0]])
SOLUTIONS = {"parabola": VECTOR, "rosenbrock": np.ones(2), "matrix parabola": MATRIX, "mixed": (MATRIX, VECTOR, 3.0)}
START = {
    "parabola": np.array([-1.0, 10.0, 1.0]),
    "rosenbrock": np.zeros(2),
    "matrix parabola": np.ones((2, 2)),
    "mixed": (np.ones((2, 2)), np.array([-1.0, 10.0, 1.0]), 0.5),
}
STEPS = 30_000
DECAYING = optax.exponential_decay(0.02, 1000, 0.75)
CONVERGING: dict[str, optax.GradientTransformation] = {
    "adalomo": adalomo(DECAYING),
    "adalomo b2": adalomo(DECAYING, b2=0.99),
    "adalomo weight decay": adalomo(DECAYING, weight_decay=1e-5),
    "adalomo layer axes": adalomo(
        DECAYING, layer_axes=lambda params: jax.tree.map(lambda p: 0 if p.ndim else None, params)
    ),
    "lomo": lomo(1e-3),
    "lomo clip, weight decay": lomo(2e-3, clip_value=10.0, weight_decay=1e-5),
}


def minimized(tx: optax.GradientTransformation, sign: float = 1.0) -> Any:
    """One program minimizes all problems: the optimizers treat leaves separately."""
    loss = lambda params: sign * sum(PROBLEMS[name](params[name]) for name in PROBLEMS)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START)
    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=STEPS)[0][0])(params)


@pytest.mark.parametrize("name", always(CONVERGING, SOME))
def test_converges(name: str):
    chex.assert_trees_all_close(minimized(CONVERGING[name]), SOLUTIONS, rtol=3e-2, atol=3e-2)


def test_uphill_it_does_not_converge():
    reached = minimized(CONVERGING["adalomo"], sign=-1.0)
    for name in PROBLEMS:
        with pytest.raises(AssertionError):
            chex.assert_trees_all_close(reached[name], SOLUTIONS[name], rtol=3e-2, atol=3e-2)


SHARDED: dict[str, tuple[tuple[int, ...], list[P]]] = {
    "head": ((8, 16), [P(), P(None, "x"), P("x", None), P("x", "y"), P(("x", "y"), None), P(None, ("x", "y"))]),
    "layers": (
        (8, 4, 16),
        [P(), P(None, None, "x"), P("x", None, None), P("y", None, "x"), P(None, "x", None), P("x", "y", None)],
    ),
    "norms": ((8, 16), [P(), P("x", None), P(None, "y"), P("y", "x")]),
    "scalar": ((), [P()]),
}
"""Shapes with several shardings each: over the last axis, the second-to-last one, the layer axis, and more than one."""


def on_mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices("cpu")[:8])


def placed(mesh: jax.sharding.Mesh, x: jax.Array, spec: P) -> jax.Array:
    return jax.device_put(np.asarray(x), NamedSharding(mesh, spec))


@pytest.mark.parametrize("name", always(OPTIMIZERS, SOME[:1]))
def test_types_stay_what_they_were_on_an_explicit_mesh(name: str):
    mesh = on_mesh()
    with jax.set_mesh(mesh):
        params = {n: [placed(mesh, jnp.ones(shape), spec) for spec in specs] for n, (shape, specs) in SHARDED.items()}
        tx = OPTIMIZERS[name](lambda step: LR)
        before = jax.make_jaxpr(lambda p: (p, tx.init(p)))(params)
        traced = jax.make_jaxpr(lambda p: tx.update(p, tx.init(p), p))(params)
        assert [*map(str, traced.out_avals)] == [*map(str, before.out_avals)]


@pytest.mark.parametrize(
    "name, jit",
    [("adalomo layer axes", True), slow("lomo clip, weight decay", True), slow("lomo clip, weight decay", False)],
)
def test_values_and_types_are_right_on_an_explicit_mesh(name: str, jit: bool):
    mesh, specs = on_mesh(), {"head": P("x", "y"), "layers": P("y", None, "x"), "norms": P("x", None), "scalar": P()}
    tx = OPTIMIZERS[name](lambda step: LR)
    rng = np.random.default_rng(0)
    alone = {n: jnp.asarray(rng.standard_normal(shape), jnp.float32) for n, (shape, _) in SHARDED.items()}
    expected, _ = jax.jit(tx.update)(alone, tx.init(alone), alone)
    with jax.set_mesh(mesh):
        params = {n: placed(mesh, p, specs[n]) for n, p in alone.items()}
        state = tx.init(params)
        updates, after = (jax.jit(tx.update) if jit else tx.update)(params, state, params)
        assert types((updates, after)) == types((params, state))
        assert types(jax.jit(tx.init)(params)) == types(state)
        assert_close(updates, expected)


def test_the_factors_are_sharded_as_the_rows_and_columns_are():
    mesh = on_mesh()
    with jax.set_mesh(mesh):
        p = jax.device_put(jnp.ones((8, 4, 16)), NamedSharding(mesh, P("x", None, "y")))
        specs = lambda tx: tuple(jax.typeof(x).sharding.spec for x in tx.init(p)[1:3])
        assert specs(scale_by_adalomo()) == (P("x", None), P("x", "y"))
        assert specs(scale_by_adalomo(layer_axes=0)) == (P("x", None), P("x", "y"))
        assert specs(scale_by_adalomo(layer_axes=1)) == (P(None, "x"), P(None, "y"))
