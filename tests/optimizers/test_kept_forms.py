"""What int8 and 24-bit weights keep, and how updates are added to them, against NumPy in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import always

from adalomo_jax import Float24, Int8, float24, floats, int8
from adalomo_jax.optimizers.float24 import encode as encode_float24
from adalomo_jax.optimizers.int8 import encode as encode_int8

ENCODE = {"int8": encode_int8, "bf16+8": encode_float24}
WEIGHTS = {
    "normal": np.random.default_rng(0).normal(size=(48, 6)),
    "zeros": np.zeros((48, 6)),
    "one value": np.full((48, 6), -0.37),
    "tiny": 1e-30 * np.random.default_rng(1).normal(size=(48, 6)),
    "large": 1e4 * np.random.default_rng(2).normal(size=(48, 6)),
    "an outlier": np.random.default_rng(3).normal(size=(48, 6)) * np.where(np.arange(288).reshape(48, 6) == 7, 1e4, 1),
    "a rest": np.random.default_rng(4).normal(size=(47, 7)),
    "a vector": np.random.default_rng(5).normal(size=50),
    "a row": np.random.default_rng(6).normal(size=(1, 9)),
    "a stack": np.random.default_rng(7).normal(size=(3, 20, 5)),
    "subnormal": np.full((4, 4), 1e-40),
}
BLOCK = 16


def kept(name, weights, **options):
    encode = ENCODE["int8" if name == "int8" else "bf16+8"]
    options = {"block": BLOCK} | options if name == "int8" else {}
    return encode(jnp.asarray(weights, jnp.float32), **options)


def grid_of(weights):
    """The distance between neighbours on the grid of each weight, in float64, as the docstring of `int8` says it."""
    x = np.abs(np.asarray(np.float32(weights), np.float64))
    axis = max(x.ndim - 2, 0)
    size = x.shape[axis]
    block = next((n for n in range(min(BLOCK, size), (BLOCK - 1) // 2, -1) if size % n == 0), min(BLOCK, size))
    parts = [x.take(range(k, min(k + block, size)), axis) for k in range(0, size, block)]
    return np.concatenate([np.broadcast_to(p.max(axis, keepdims=True) / 120, p.shape) for p in parts], axis)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_int8_is_the_nearest_value_of_its_blocks_grid(weights):
    grid = grid_of(weights)
    error = np.abs(np.asarray(kept("int8", weights).floats(), np.float64) - np.float32(weights))
    assert np.all(error <= 0.5 * grid * (1 + 2.0**-8) + 2.0**-126)  # a scale has the precision of bfloat16


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_24_bits_are_within_half_a_unit_of_the_last_one(weights):
    error = np.abs(np.asarray(kept("bf16+8", weights).floats(), np.float64) - np.float32(weights))
    assert np.all(error <= 2.0**-16 * np.abs(weights) + 2.0**-126)


@pytest.mark.parametrize("form", ENCODE)
@pytest.mark.parametrize("name", always(WEIGHTS, ["normal", "zeros", "one value", "large"]))
def test_a_zero_update_changes_no_bit(form, name):
    weights = WEIGHTS[name]
    before = after = kept(form, weights)
    for i in range(20):
        after = after.add(jnp.zeros(weights.shape), jax.random.key(i))
    chex.assert_trees_all_equal(before, after.add(jnp.zeros(weights.shape), None), after)


def slope(moved, update):
    """The share of an update that has arrived: 1 if all has, 0 if nothing has."""
    return np.sum(moved * update) / np.sum(update**2)


@pytest.mark.parametrize("form", ENCODE)
@pytest.mark.parametrize("name", ["zeros", "tiny", "large", "a rest"])
def test_updates_arrive_whatever_the_size_of_the_weights(form, name):
    w = kept(form, WEIGHTS[name])
    size = 0.05 * np.max(np.abs(WEIGHTS[name])) or 1e-3
    update = size * np.random.default_rng(10).normal(size=w.shape)
    add = jax.jit(jax.vmap(lambda key: w.add(jnp.asarray(update, jnp.float32), key).floats()))
    moved = np.asarray(add(jax.random.split(jax.random.key(3), 400)), np.float64).mean(0) - np.asarray(w.floats())
    assert abs(slope(moved, update) - 1) < 0.02


@pytest.mark.parametrize("form", ENCODE)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0], ids=["small", "middle", "outgrows"])
def test_the_mean_over_keys_is_the_sum(form, size):
    """Within five standard errors, each weight by itself; rounded to nearest, small updates are lost."""
    weights, keys = WEIGHTS["normal"], 4000
    update = size * np.random.default_rng(9).normal(size=weights.shape)
    w = kept(form, weights)
    exact = np.asarray(w.floats(), np.float64) + np.float32(update)
    add = jax.jit(jax.vmap(lambda key: w.add(jnp.asarray(update, jnp.float32), key).floats()))
    found = np.asarray(add(jax.random.split(jax.random.key(1), keys)), np.float64)
    unit = (
        (1 + 2.0**-8) * grid_of(np.maximum(np.abs(exact), np.abs(weights)))
        if form == "int8"
        else 2.0**-15 * np.abs(exact)
    )
    bound = 5 * unit / np.sqrt(keys) + 2.0**-16 * unit + 1e-6 * np.abs(exact)
    assert np.all(np.abs(found.mean(0) - exact) <= bound)
    assert np.all(np.abs(found - exact) <= 1.0001 * unit + 1e-6 * np.abs(exact))
    assert abs(slope(found.mean(0) - np.asarray(w.floats(), np.float64), update) - 1) < 0.06
    if size == 1e-4 and form == "int8":
        lost = np.asarray(w.add(jnp.asarray(update, jnp.float32), None).floats())
        assert np.mean(lost == np.asarray(w.floats())) > 0.9


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_smallest_updates_of_both_signs_add_up(sign):
    """A hundred thousandth of a unit, thousands of times smaller than the random bits of 16 bits would tell apart."""
    w = kept("int8", np.linspace(-1, 1, 64).reshape(16, 4))
    unit = np.asarray(w.scales, np.float32)[0, 0]
    add = jax.jit(jax.vmap(lambda key: w.add(jnp.full(w.shape, sign * 1e-5 * unit), key).values - w.values))
    moved = np.asarray(add(jax.random.split(jax.random.key(2), 40_000)), np.float64).mean(0)[:, 0].mean()
    due = sign * 1e-5
    assert abs(moved - due) < 5 * np.sqrt(abs(due) / (16 * 40_000))


def test_a_scale_stays_until_its_block_outgrows_it():
    w = kept("int8", WEIGHTS["normal"])
    inwards = -0.3 * w.floats()
    chex.assert_trees_all_equal(w.add(inwards, jax.random.key(0)).scales, w.scales)
    outwards = jnp.zeros(w.shape).at[20, 3].set(100.0)  # in the second of three blocks
    changed = np.asarray(w.add(outwards, jax.random.key(0)).scales != w.scales)
    assert changed.shape == (3, 6) and changed.sum() == 1 and changed[1, 3]
    assert abs(float(w.add(outwards, jax.random.key(0)).floats()[20, 3]) - float(100 + w.floats()[20, 3])) < 100 / 119


@pytest.mark.parametrize("form", ENCODE)
@pytest.mark.parametrize("value", [jnp.inf, -jnp.inf, jnp.nan, 3.4e38])
def test_what_is_not_finite_is_not_written(form, value):
    """Its weight stays, and so do the others: they are not moved to a grid of infinite width."""
    w = kept(form, WEIGHTS["large"])
    update = jnp.zeros(w.shape).at[5, 2].set(value)
    start = w if value != 3.4e38 else kept(form, np.full((48, 6), 3e38))
    chex.assert_trees_all_equal(start.add(update, jax.random.key(0)), start)


@pytest.mark.parametrize(("form", "dtype"), [("int8", "float16"), ("int8", "bfloat16"), ("bf16+8", "bfloat16")])
def test_what_the_floats_dtype_cannot_hold_is_not_written(form, dtype):
    """Weights go up to its largest number and no further."""
    most = float(jnp.finfo(dtype).max)
    w = ENCODE[form](jnp.full((4, 4), 0.96 * most, dtype))
    add = jax.jit(lambda w, key: w.add(jnp.full(w.shape, 0.004 * most, jnp.float32), key))
    for i in range(30):
        w = add(w, jax.random.key(i))
    found = np.asarray(w.floats(), np.float64)
    assert np.all(np.isfinite(found)) and np.all(found > 0.98 * most)


@pytest.mark.slow
@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 50), st.integers(-2, -1), st.integers(0, 2**31 - 1))
def test_any_size_and_block(m, n, block, axis, seed):
    weights = np.random.default_rng(seed).normal(size=(m, n))
    w = kept("int8", weights, block=block, axis=axis)
    assert w.shape == (m, n) and w.values.dtype == jnp.int8
    size = w.values.shape[axis]
    assert size <= block and 0 <= size * w.values.shape[axis - 1] - (m, n)[axis] < size
    assert w.scales.size * size == w.values.size
    assert np.max(np.abs(np.asarray(w.floats()) - weights)) <= np.max(np.abs(weights)) / 238
    assert np.all(np.isfinite(w.add(jnp.ones((m, n)), jax.random.key(seed)).floats()))


def test_trees_and_what_is_chosen():
    params = {
        "layers": {"up": jnp.ones((3, 4, 5), jnp.bfloat16), "scale": jnp.ones((3, 4))},
        "head": jnp.ones((4, 7)),
        "n": jnp.arange(3),
    }
    stacks = int8(params)
    assert isinstance(stacks["layers"]["up"], Int8) and stacks["head"] is params["head"] and stacks["n"] is params["n"]
    assert stacks["layers"]["up"].dtype == floats(stacks)["layers"]["up"].dtype == jnp.bfloat16
    assert isinstance(int8(params, where=lambda path: path == "head")["head"], Int8)
    both = int8(stacks, where={"layers": False, "head": True, "n": False})
    assert isinstance(both["head"], Int8) and both["layers"]["up"] is stacks["layers"]["up"]
    wide = float24(params)
    assert isinstance(wide["head"], Float24) and wide["n"] is params["n"]
    assert floats(wide)["layers"]["up"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal_shapes_and_dtypes(floats(both), floats(wide), params)
    shapes = jax.eval_shape(lambda: params)
    chex.assert_trees_all_equal_shapes_and_dtypes(int8(shapes), int8(params), jax.eval_shape(int8, params))


def test_a_tree_of_something_else_is_shown():
    w = kept("int8", WEIGHTS["normal"])
    assert repr(jax.tree.map(lambda x: None, w)) == "Int8()" and repr(jax.tree.map(lambda x: 1, w)) == "Int8(1, 1)"
    assert w != kept("int8", WEIGHTS["normal"]) and isinstance(hash(w), int)


def test_empty_arrays_have_a_form():
    params = {"w": jnp.ones((3, 0, 4)), "v": jnp.ones((2, 4, 0)), "x": jnp.ones((2, 4, 4))}
    chex.assert_trees_all_equal_shapes_and_dtypes(floats(int8(params)), params)


REFUSED = {
    "not finite": (
        lambda p: int8({"w": p["w"].at[0, 1, 2].set(jnp.nan)}),
        "'w' cannot be kept in another form: it has NaN",
    ),
    "becomes infinite": (
        lambda p: float24({"w": jnp.full((2, 2), jnp.finfo(jnp.float32).max)}),
        "'w' cannot be kept .* NaN, infinities or numbers that become infinite",
    ),
    "block": (lambda p: int8(p, block=1), "block must be an integer of at least 2, got 1"),
    "axis": (lambda p: int8(p, axis=-4), r"axis must be from -3 to -1 for an array of the shape \[2, 3, 4\], got -4"),
    "short blocks": (
        lambda p: int8({"w": p["w"].astype(jnp.bfloat16)[:, :1]}),
        r"'w' cannot be kept .* blocks of 1 along axis -2 take 3.00 bytes a weight, and bfloat16 takes 2.* axis=-1",
    ),
    "nothing": (lambda p: int8({"w": p["v"]}), "None of the 1 leaves of params is chosen"),
    "none": (lambda p: int8(p, where=lambda path: False), "None of the 3 leaves of params is selected by where"),
    "integers": (lambda p: int8(p, where=lambda path: path == "n"), r"'n' is int32\[3\]"),
    "a tree": (
        lambda p: float24(p, where={"w": True}),
        "where must be a tree like params, or a prefix of it, of bools",
    ),
    "no bool": (lambda p: int8(p, where=lambda path: "yes"), "where must return True or False of a path, but of 'n'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, error = REFUSED[case]
    with pytest.raises(ValueError, match=error):
        call({"w": jnp.ones((2, 3, 4)), "v": jnp.ones(3), "n": jnp.arange(3)})
