"""Stochastic rounding is unbiased, goes to one of the two neighbours, and changes nothing else."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiers import slow

from adalomo_jax.optimizers import apply_updates, stochastic_round
from adalomo_jax.optimizers.rounding import _to_nearest, hashed_bits, rounds_stochastically

NARROW = ["bfloat16", "float16"]
SUBNORMAL = 2.0**-24  # the spacing of float16 below 2**-14


def key(seed: int = 0, impl: str | None = None) -> jax.Array:
    return jax.random.key(seed, impl=impl)


def all_values(dtype: str) -> np.ndarray:
    """Every finite value of a 16-bit dtype, in order, as float32; zero once."""
    values = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype)).astype(np.float32)
    return np.unique(values[np.isfinite(values)])


round_many = jax.jit(stochastic_round, static_argnums=1)
to_nearest = jax.jit(_to_nearest, static_argnums=1)


def deviation(rounded: Any, x: float, below: float, above: float) -> float:
    """How far the mean of many roundings of ``x`` is from ``x``, in standard errors of a fair rounding."""
    rounded = np.asarray(rounded, np.float64)
    assert set(rounded.tolist()) <= {below, above}
    up = (x - below) / (above - below)
    return abs(np.mean(rounded == above) - up) / np.sqrt(up * (1 - up) / rounded.size)


UNBIASED = [
    *((dtype, x) for dtype in NARROW for x in (1.001, -1.001, 1.9999, 3e-3, -7.77, 1000.3, 6.2e-5)),
    ("bfloat16", 1e-38),
    ("bfloat16", 3.0e38),
    *(("float16", units * SUBNORMAL) for units in (0.25, -0.25, 0.9, 1.5, -3.75, 1000.3, 1023.5)),
]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("dtype, x", UNBIASED)
def test_the_mean_is_the_value(dtype: str, x: float, impl: str):
    x, values = float(np.float32(x)), all_values(dtype)
    i = int(np.searchsorted(values, x, "right"))
    rounded = round_many(jnp.full(200_000, x, jnp.float32), dtype, key(1, impl))
    # 5 standard errors: by chance once in 1.7 million.
    assert deviation(rounded, x, float(values[i - 1]), float(values[i])) < 5


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_to_nearest_is_not_unbiased(dtype: str):
    x, values = float(np.float32(1.0002)), all_values(dtype)
    i = int(np.searchsorted(values, x, "right"))
    to_nearest = jnp.full(200_000, x, jnp.float32).astype(dtype)
    assert deviation(to_nearest, x, float(values[i - 1]), float(values[i])) > 50


@pytest.mark.parametrize("dtype", NARROW)
def test_a_sum_of_many_small_steps_arrives(dtype: str):
    steps, size, copies = 400, 2e-4, 2000

    def trained(key: jax.Array | None) -> float:
        def step(w: Any, i: Any) -> Any:
            of_step = None if key is None else jax.random.fold_in(key, i)
            return apply_updates(w, jnp.full(copies, size, jnp.float32), key=of_step), None

        w, _ = jax.lax.scan(step, jnp.ones(copies, dtype), jnp.arange(steps))
        return np.asarray(w, np.float64).mean()

    standard_error = np.sqrt(steps * size * float(jnp.finfo(dtype).eps) / copies)
    assert abs(trained(key()) - (1 + steps * size)) < 5 * standard_error
    assert abs(trained(None) - (1 + steps * size)) > 5 * standard_error


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("units", [slow(1), -3, slow(200), slow(1023)])
def test_updates_that_are_subnormal_in_float16_arrive(units: int, compiled: bool):
    """The steps of a small learning rate are such updates."""
    p, u, spacing = 2.0**-6, units * SUBNORMAL, 2.0**-16
    write = partial(apply_updates, key=key(3))
    write = jax.jit(write) if compiled else write
    written: Any = write(jnp.full(400_000, 1.25 * p, jnp.float16), jnp.full(400_000, u, jnp.float16))
    below = 1.25 * p + np.floor(u / spacing) * spacing
    assert deviation(written, 1.25 * p + u, below, below + spacing) < 5


@given(st.sampled_from(NARROW), st.integers(0, 2**31))
def test_what_xla_may_not_leave_out_rounds_as_numpy_does(dtype: str, seed: int):
    x = np.float32(np.random.default_rng(seed).standard_normal(64) * 2.0 ** np.arange(-40, 24).clip(-27, 15))
    np.testing.assert_array_equal(np.asarray(to_nearest(x, dtype)), x.astype(jnp.dtype(dtype)).astype(np.float32))


@pytest.mark.parametrize("dtype", NARROW)
def test_values_of_the_dtype_stay(dtype: str):
    values = all_values(dtype)
    tiny = np.float32(jnp.finfo(jnp.float32).tiny)
    normal = values[(np.abs(values) >= tiny) | (values == 0)]  # XLA's CPU flushes float32's own subnormals
    np.testing.assert_array_equal(np.asarray(round_many(normal, dtype, key()), np.float32), normal)


@pytest.mark.parametrize("dtype", NARROW)
def test_what_is_not_finite_stays(dtype: str):
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan] * 100)
    np.testing.assert_array_equal(np.asarray(round_many(x, dtype, key()), np.float32), x)


@given(
    st.sampled_from(NARROW),
    st.lists(st.floats(-65504, 65504, width=32, allow_subnormal=False), min_size=32, max_size=32),
    st.integers(0, 2**31),
)
def test_the_result_is_one_of_the_two_neighbours(dtype: str, xs: list[float], seed: int):
    x, values = np.asarray(xs, np.float32), all_values(dtype)
    below, above = values[np.searchsorted(values, x, "right") - 1], values[np.searchsorted(values, x, "left")]
    rounded = np.asarray(round_many(x, dtype, key(seed)), np.float32)
    assert np.all((rounded == below) | (rounded == above))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("dtype", NARROW)
def test_jit_and_eager_are_equal(dtype: str, impl: str):
    x = np.float32(np.random.default_rng(0).standard_normal(1000) * 2.0 ** np.arange(-500, 500).clip(-26, 10))
    eager = stochastic_round(jnp.asarray(x), dtype, key(0, impl))
    assert (eager.dtype, eager.shape) == (jnp.dtype(dtype), x.shape)
    np.testing.assert_array_equal(np.asarray(eager), np.asarray(round_many(x, dtype, key(0, impl))))


def mixed_tree() -> Any:
    normal = lambda seed, *shape: jnp.float32(np.random.default_rng(seed).standard_normal(shape))
    return {
        "bf16": normal(0, 40, 50).astype(jnp.bfloat16),
        "layers": [normal(1, 3, 40).astype(jnp.float16), normal(2, 7)],
        "scalar": jnp.float32(3.0),
        "none": None,
    }


def small_updates(params: Any) -> Any:
    return jax.tree.map(lambda p: -3e-4 * p.astype(jnp.float32), params)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def test_without_a_key_it_is_optax_bit_for_bit():
    params = mixed_tree()
    updates = small_updates(params)
    ours, theirs = apply_updates(params, updates), optax.apply_updates(params, updates)
    assert jax.tree.map(jax.typeof, ours) == jax.tree.map(jax.typeof, theirs)
    assert bits(ours) == bits(theirs)
    assert bits(apply_updates(params, updates, key=key())) != bits(theirs)


def test_with_a_key_only_narrow_leaves_are_rounded_otherwise():
    params = mixed_tree()
    updates = small_updates(params)
    rounded, nearest = apply_updates(params, updates, key=key()), optax.apply_updates(params, updates)
    assert jax.tree.map(jax.typeof, rounded) == jax.tree.map(jax.typeof, params)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), rounded, nearest)
    assert changed == jax.tree.map(lambda p: rounds_stochastically(p.dtype), params)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_a_key_repeats_itself_and_another_differs(impl: str):
    params = mixed_tree()
    write = partial(apply_updates, params, small_updates(params))
    first = bits(write(key=key(0, impl)))
    assert first == bits(write(key=key(0, impl))) == bits(jax.jit(lambda k: write(key=k))(key(0, impl)))
    assert first != bits(write(key=key(1, impl)))


def test_leaves_of_equal_values_are_rounded_independently():
    params = [jnp.ones(1000, jnp.bfloat16)] * 2
    written: Any = apply_updates(params, [jnp.full(1000, 1e-3)] * 2, key=key())
    assert bool(jnp.any(written[0] != written[1]))


@pytest.mark.parametrize("dtype, narrow", [("bfloat16", True), ("float16", True), ("float32", False), ("int32", False)])
def test_which_dtypes_are_rounded_stochastically(dtype: str, narrow: bool):
    assert rounds_stochastically(dtype) == narrow


def as_signs(bits: jax.Array) -> np.ndarray:
    """1.0 or -1.0 for each of 32 bits, ``[32, ...]``."""
    return 2.0 * ((np.asarray(bits) >> np.arange(32, dtype=np.uint32).reshape(-1, *[1] * bits.ndim)) & 1) - 1.0


def test_bits_are_fair_and_independent_of_their_neighbours_and_of_other_keys():
    one, other = as_signs(hashed_bits(key(0), (300, 400))), as_signs(hashed_bits(key(1), (300, 400)))
    pairs = [one[:, :-1] * one[:, 1:], one[:, :, :-1] * one[:, :, 1:], one[1:] * one[:-1], one * other]
    for products in (one, other, *pairs):
        errors = products.reshape(products.shape[0], -1).mean(axis=1) * np.sqrt(products[0].size)
        assert np.abs(errors).max() < 5  # by chance once in 1.7 million


def test_bits_of_a_counter_alone_would_not_pass():
    counter = as_signs(jnp.arange(120_000, dtype=jnp.uint32).reshape(300, 400))
    assert np.abs((counter[:, :, :-1] * counter[:, :, 1:]).mean(axis=(1, 2))).max() > 0.5


def test_bits_are_the_same_on_a_mesh():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    x = jax.random.normal(key(2), (64, 32))
    on_mesh = round_many(jax.device_put(x, sharding), "bfloat16", key(3))
    assert on_mesh.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(np.asarray(on_mesh), np.asarray(round_many(x, "bfloat16", key(3))))
