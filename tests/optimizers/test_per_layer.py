"""per_layer makes a transformation on stacks equal to the transformation on separate layers."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import always, slow
from tolerances import assert_apart, assert_close

from adalomo_jax.optimizers import ScaleByAdalomoState, adalomo, lomo, per_layer

AXES = {"attention": 0, "mlp": 1, "norm": -1, "decoder": 0, "head": None}
DEPTHS = {"attention": 3, "mlp": 3, "norm": 3, "decoder": 2}
SHAPES = {"attention": (6, 4), "mlp": (6, 4), "norm": (6,), "decoder": (2, 4, 3), "head": (6, 4)}
"""The shapes of one layer."""


def layers_apart(seed: int) -> dict[str, Any]:
    """Separate layers of very different sizes, so that anything shared between them shows."""
    rng = np.random.default_rng(seed)
    draw = lambda name, k: np.float32(rng.standard_normal(SHAPES[name]) * 5.0**k)
    return {
        name: draw(name, 0) if axis is None else [draw(name, k) for k in range(DEPTHS[name])]
        for name, axis in AXES.items()
    }


def stacked(apart: dict[str, Any]) -> dict[str, Any]:
    return {name: x if AXES[name] is None else np.stack(x, AXES[name]) for name, x in apart.items()}


def shapes_of(state: Any) -> Any:
    """The shapes of the moments: of rows, of columns, and of single entries."""
    return jax.tree.map(jnp.shape, (state.v_row, state.v_col, state.v))


def matrices_only(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def labels(params: Any) -> Any:
    return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params)


def adafactor(**options: Any) -> optax.GradientTransformation:
    return optax.adafactor(0.1, min_dim_size_to_factor=2, **options)


SCHEDULE = optax.linear_schedule(0.1, 0.3, 2)
TRANSFORMATIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(SCHEDULE, weight_decay=0.1),
    "adamw with a mask by rank": lambda: optax.adamw(0.1, weight_decay=0.5, mask=matrices_only),
    "adafactor": lambda: adafactor(momentum=0.9, weight_decay_rate=0.1),
    "masked by rank": lambda: optax.masked(adafactor(), matrices_only),
    "masked by name": lambda: optax.masked(optax.adam(0.1), {name: name in ("norm", "head") for name in AXES}),
    "multi_transform": lambda: optax.multi_transform({"matrix": adafactor(), "vector": optax.adam(SCHEDULE)}, labels),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE, weight_decay=0.1),
    "adalomo": lambda: adalomo(SCHEDULE, weight_decay=0.5, weight_decay_mask=matrices_only),
    "inject_hyperparams of adalomo": lambda: optax.inject_hyperparams(adalomo)(learning_rate=SCHEDULE, b2=0.5),
    "lomo": lambda: lomo(SCHEDULE, clip_value=0.5, weight_decay=0.1),
}
ALWAYS = [
    "masked by name",
    "multi_transform",
    "inject_hyperparams",
    "adalomo",
]
MIXES_A_STACK = ["adafactor", "adalomo", "multi_transform"]


def run(tx: optax.GradientTransformation, params: Any, grads: list[Any]) -> tuple[Any, Any]:
    """The updates of all steps, and the last state."""
    state, updates, update = tx.init(params), [], jax.jit(tx.update)
    for g in grads:
        u, state = update(g, state, params)
        params = optax.apply_updates(params, u)
        updates.append(u)
    return updates, state


@functools.cache
def run_both(name: str) -> tuple[Any, Any, Any, Any]:
    params, grads = layers_apart(0), [layers_apart(seed) for seed in (1, 2, 3)]
    updates_apart, state_apart = run(TRANSFORMATIONS[name](), params, grads)
    updates, state = run(per_layer(TRANSFORMATIONS[name](), AXES), stacked(params), [stacked(g) for g in grads])
    return updates, state, [stacked(u) for u in updates_apart], state_apart


def stacked_state(state: Any) -> dict[str, np.ndarray]:
    """The leaves of a state of separate layers, by path, with each leaf's layers stacked."""
    layers: dict[str, dict[Any, Any]] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        of_leaf = [
            i for i, key in enumerate(path) if isinstance(key, jax.tree_util.DictKey) and AXES.get(key.key) is not None
        ]
        layer = path[of_leaf[0] + 1].idx if of_leaf else None
        kept = [key for i, key in enumerate(path) if not of_leaf or i != of_leaf[0] + 1]
        layers.setdefault(jax.tree_util.keystr(tuple(kept)), {})[layer] = x
    return {path: xs[None] if None in xs else np.stack([xs[k] for k in range(len(xs))]) for path, xs in layers.items()}


@pytest.mark.parametrize("name", always(TRANSFORMATIONS, ALWAYS))
def test_equals_the_transformation_on_the_layers_apart(name: str):
    updates, state, updates_apart, state_apart = run_both(name)
    assert_close(updates, updates_apart)
    by_path = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}
    assert_close(by_path, stacked_state(state_apart))
    shared = [x for path, x in by_path.items() if path.endswith(".count") or ".hyperparams[" in path]
    assert shared or name == "adafactor" or name.startswith("masked")
    assert {x.shape for x in shared} <= {()}


@pytest.mark.parametrize("name", always(TRANSFORMATIONS, ALWAYS))
def test_a_layer_that_is_not_updated_breaks_it(name: str):
    updates, _, updates_apart, _ = run_both(name)
    skipped = np.array(updates[-1]["mlp"])
    skipped[:, 1] = 0
    assert_apart(skipped, updates_apart[-1]["mlp"])


@pytest.mark.parametrize("name", always(MIXES_A_STACK, ["adafactor"]))
def test_the_transformation_on_whole_stacks_breaks_it(name: str):
    _, _, apart, _ = run_both(name)
    whole, _ = run(TRANSFORMATIONS[name](), stacked(layers_apart(0)), [stacked(layers_apart(k)) for k in (1, 2, 3)])
    assert_apart(whole, apart)


def test_the_state_of_adalomo_on_stacks():
    state: Any = adalomo(0.1, layer_axes=AXES).init(stacked(layers_apart(0)))
    (rule, *_) = state
    assert isinstance(rule, ScaleByAdalomoState)
    assert (rule.count.shape, rule.count.dtype) == ((), jnp.int32)
    unused = {"attention": (3, 1), "mlp": (3, 1), "norm": (3, 1), "decoder": (2, 1), "head": (1,)}
    matrices = {"attention": (3, 6), "mlp": (3, 6), "decoder": (2, 2, 4), "head": (6,)}
    columns = {"attention": (3, 4), "mlp": (3, 4), "decoder": (2, 2, 3), "head": (4,)}
    assert shapes_of(rule) == (unused | matrices, unused | columns, unused | {"norm": (3, 6)})


@functools.cache
def compiled_adafactor():
    return jax.jit(adafactor().update)


@pytest.mark.parametrize("axis", [0, 1, -1, slow(2), slow(-2), slow(-3)])
def test_any_axis_is_the_layer_axis(axis: int):
    rng = np.random.default_rng(0)
    layers, grads = rng.standard_normal((2, 4, 5, 6)).astype(np.float32)
    tx = adafactor()
    update = compiled_adafactor()
    expected: Any = [update(g, tx.init(p), p)[0] for g, p in zip(grads, layers)]
    on_stack = per_layer(tx, axis)
    p, g = np.moveaxis(layers, 0, axis), np.moveaxis(grads, 0, axis)
    updates = np.asarray(jax.jit(on_stack.update)(g, on_stack.init(p), p)[0])
    assert_close(np.moveaxis(updates, axis, 0), np.stack(expected))


@pytest.mark.parametrize("axes", [
    {"encoder": 0, "head": None},
    {"encoder": {"w": 0, "b": 0}, "head": None},
    lambda params: {"encoder": jax.tree.map(lambda _: 0, params["encoder"]), "head": None},
])  # fmt: skip
def test_axes_are_a_tree_a_prefix_or_a_callable(axes: Any):
    params = {"encoder": {"w": jnp.ones((3, 4, 5)), "b": jnp.ones((3, 5))}, "head": jnp.ones((5, 2))}
    state: Any = adalomo(0.1, layer_axes=axes).init(params)
    (rule, *_) = state
    assert shapes_of(rule) == (
        {"encoder": {"w": (3, 4), "b": (3, 1)}, "head": (5,)},
        {"encoder": {"w": (3, 5), "b": (3, 1)}, "head": (2,)},
        {"encoder": {"w": (3, 1), "b": (3, 5)}, "head": (1,)},
    )


@pytest.mark.parametrize("axes, message", [
    ({"layers": 0}, r"layer_axes has no entry for \['head'\]; give it the axis of its layers, or None"),
    ({"layers": 3, "head": None}, r"layer_axes of \['layers'\] must be an axis of its shape \(3, 4, 5\), got 3"),
    ({"layers": -4, "head": None}, r"layer_axes of \['layers'\] must be an axis of its shape \(3, 4, 5\), got -4"),
    (lambda params: {"layers": 0}, r"layer_axes has no entry for \['head'\]"),
])  # fmt: skip
def test_a_missing_or_impossible_axis_is_refused(axes: Any, message: str):
    params = {"layers": jnp.ones((3, 4, 5)), "head": jnp.ones((5, 2))}
    for tx in (adalomo(0.1, layer_axes=axes), per_layer(optax.adam(0.1), axes)):
        with pytest.raises(ValueError, match=message):
            tx.init(params)
        with pytest.raises(ValueError, match=message):
            tx.update(params, optax.EmptyState(), params)


def test_no_layer_axes_leave_the_transformation_as_it_is():
    params, g = stacked(layers_apart(0)), stacked(layers_apart(1))
    tx, lifted = adafactor(), per_layer(adafactor(), None)
    update, update_lifted = jax.jit(tx.update), jax.jit(lifted.update)
    assert_close(update_lifted(g, lifted.init(params), params), update(g, tx.init(params), params))


def test_extra_arguments_reach_the_transformation():
    def update(updates, state, params=None, *, scale, **_):
        return jax.tree.map(lambda u: u * scale, updates), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), cast(Any, update))
    g = stacked(layers_apart(0))
    updates, _ = per_layer(tx, AXES).update(g, per_layer(tx, AXES).init(g), g, scale=3.0)
    assert_close(updates, jax.tree.map(lambda x: 3 * x, g))


def test_layers_within_a_layer_are_refused():
    params = {"w": jnp.ones((3, 4, 5))}
    with pytest.raises(ValueError, match="leave layer_axes out of tx"):
        per_layer(adalomo(1e-2, layer_axes={"w": 0}), {"w": 0}).init(params)


def test_a_mask_function_that_asks_for_attributes_of_absent_leaves_is_explained():
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    mask: Any = lambda p: {"w": p["w"].ndim > 1, "b": p["b"].ndim > 1}
    tx = optax.adamw(1e-3, mask=mask)
    with pytest.raises(ValueError, match=r"Write it with jax\.tree\.map"):
        per_layer(tx, {"w": 0, "b": None}).init(params)
