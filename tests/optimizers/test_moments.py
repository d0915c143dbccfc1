"""The arithmetic on one tensor equals the paper's equations with an explicit `v`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from tiers import slow
from tolerances import assert_apart, assert_close

from adalomo_jax.optimizers import moments
from adalomo_jax.optimizers.moments import FactoredMoment
from adalomo_jax.optimizers.sums import sums_as_one, sums_as_pair, sums_as_two

SUMS = (sums_as_one, sums_as_two, sums_as_pair)
normalized_update = jax.jit(moments.normalized_update)
SHAPES = [(), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (2, 1, 3, 5), (3, 3, 2, 2)]


def gaussian(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def zero_moment(shape: tuple[int, ...]) -> moments.Moment:
    s = jnp.zeros(shape)
    return moments.row_and_col_means(s) if moments.is_factored(shape) else s


def variance(moment: moments.Moment) -> np.ndarray:
    if not isinstance(moment, FactoredMoment):
        return np.asarray(moment, np.float64)
    row, col = (np.asarray(x, np.float64) for x in moment)
    return np.einsum("...m,...n->...mn", row, col) / row.mean(-1)[..., None, None]


@pytest.mark.parametrize("shape", SHAPES)
def test_accumulates_the_papers_moments(shape: tuple[int, ...]):
    ours, papers, theta = zero_moment(shape), reference.init(np.zeros(shape)), np.ones(shape)
    for t in (1, 2, 3):
        g = gaussian(shape, t)
        _, ours = normalized_update(ours, g, moments.new_share_at(t, 0.8))
        _, papers = reference.adalomo_step(theta, g, papers, t, 0.0)
        assert_close(tuple(ours) if len(shape) > 1 else ours, reference.means(papers, shape))
    for without_decay in [gaussian(shape, 3)]:
        _, last = normalized_update(zero_moment(shape), without_decay, jnp.float32(1.0))
        assert_apart(tuple(last) if len(shape) > 1 else last, reference.means(papers, shape))


@pytest.mark.parametrize("threshold", [0.3, 1e3])
@pytest.mark.parametrize("shape", SHAPES)
def test_divides_by_the_root_of_v_and_normalizes(shape: tuple[int, ...], threshold: float):
    g = gaussian(shape)
    _, old = normalized_update(zero_moment(shape), gaussian(shape, 1), jnp.float32(1.0))
    u, moment = normalized_update(old, g, jnp.float32(0.3), threshold=threshold)
    raw = np.asarray(g, np.float64) / np.sqrt(variance(moment))
    expected = raw / max(1.0, reference.root_mean_square(raw) / threshold)
    assert_close(u, expected)
    assert_apart(u, raw / max(1.0, reference.root_mean_square(raw) / 0.2))
    assert_apart(u, np.asarray(g, np.float64) / variance(moment))


def test_rows_and_columns_without_gradients_stay_finite():
    g = gaussian((6, 5)).at[2].set(0.0).at[:, 3].set(0.0) * 1e12
    u, moment = normalized_update(zero_moment((6, 5)), g, jnp.float32(1.0))
    v = variance(moment)
    raw = np.divide(np.asarray(g, np.float64), np.sqrt(v), where=v > 0, out=np.zeros((6, 5)))
    assert_close(u, raw / max(1.0, reference.root_mean_square(raw)))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 1, 3, 5)])
def test_sums_over_rows_are_the_same_for_each_backend(shape: tuple[int, ...]):
    g, factor = gaussian(shape), gaussian(shape[:-1], 1)
    expected = [
        np.square(np.asarray(g, np.float64) * np.asarray(f)[..., None]).sum(-2) for f in (1 + 0 * factor, factor)
    ]
    for sums in SUMS:
        assert_close(sums(g, factor), tuple(expected))


@pytest.mark.parametrize(
    ("mode", "spec"),
    [(AxisType.Auto, ("x", None)), (AxisType.Explicit, (None, "x")), slow(AxisType.Auto, (None, "x"))]
    + [slow(AxisType.Explicit, ("x", None))],
)
def test_sums_over_rows_may_be_spread_over_devices_on_each_backend(spec, mode):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(mode,))
    g, factor = gaussian((8, 12)), gaussian((8,), 1)
    put = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))
    for sums in SUMS:
        chex.assert_trees_all_close(jax.jit(sums)(put(g, *spec), put(factor, spec[0])), sums(g, factor), rtol=1e-6)


def test_sums_over_rows_can_be_differentiated_on_each_backend():
    g, factor = gaussian((3, 4)), gaussian((3,), 1)
    loss = lambda sums, g, factor: sum(jnp.vdot(gaussian((4,), i), x) for i, x in enumerate(sums(g, factor)))
    gradients = [jax.grad(loss, (1, 2))(sums, g, factor) for sums in SUMS]
    for of_one in gradients[1:]:
        chex.assert_trees_all_close(of_one, gradients[0], rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_columns_are_the_last_two_axes_and_the_rest_are_batch_axes(shape: tuple[int, ...]):
    moment = zero_moment(shape)
    if len(shape) < 2:
        assert isinstance(moment, jax.Array) and moment.shape == shape
        return
    assert isinstance(moment, FactoredMoment)
    assert (moment.row.shape, moment.col.shape) == (shape[:-1], shape[:-2] + shape[-1:])
    g = gaussian(shape).reshape(-1, *shape[-2:])
    apart = [moments.row_and_col_means(g_i) for g_i in g]
    together = moments.row_and_col_means(g.reshape(shape))
    assert_close(together.row.reshape(len(g), -1), np.stack([m.row for m in apart]))
    assert_close(together.col.reshape(len(g), -1), np.stack([m.col for m in apart]))


@pytest.mark.parametrize(
    "shape, factored", [((), False), ((3,), False), ((1, 1), True), ((2, 0), False), ((2, 3, 4), True)]
)
def test_any_matrix_that_is_not_empty_is_factored(shape: tuple[int, ...], factored: bool):
    assert moments.is_factored(shape) == factored


def test_the_first_step_is_all_new_and_later_ones_less_and_less():
    steps = np.array([1, 2, 10, 1000])
    assert moments.new_share_at(1, 0.8) == 1.0
    for t in steps:  # one at a time: the last has digits that 1 - beta would lose
        assert_close(moments.new_share_at(t, 0.8), np.float64(t) ** -0.8)
    assert_apart(moments.new_share_at(steps, 0.8), (steps + 1) ** -0.8)


def test_the_new_share_is_float32_whatever_the_step_and_rate_are():
    assert moments.new_share_at(jnp.int32(5), jnp.bfloat16(0.8)).dtype == jnp.float32


@given(st.integers(0, 2**32 - 1), st.floats(-8, 8), st.floats(0.1, 10.0))
def test_clip_rms_scales_down_and_never_up(seed: int, log2_scale: float, threshold: float):
    u = gaussian((6, 5), seed) * 2**log2_scale
    clipped, size = moments.clip_rms(u, threshold), reference.root_mean_square(np.asarray(u, np.float64))
    assert_close(clipped, np.asarray(u, np.float64) * min(1.0, threshold / size))
    assert float(moments.rms(clipped)) <= threshold * (1 + 1e-6)


def test_clip_rms_is_over_the_whole_tensor_not_over_its_matrices():
    u = jnp.stack([gaussian((4, 5)), 10 * gaussian((4, 5), 1)])
    per_matrix = jnp.stack([moments.clip_rms(matrix, 1.0) for matrix in u])
    assert_apart(moments.clip_rms(u, 1.0), per_matrix)
    assert_close(moments.rms(moments.clip_rms(u, 1.0)), np.float64(1))


def test_rms_of_a_narrow_dtype_is_float32():
    x = jnp.full(4096, 1.0 + 2**-7, jnp.bfloat16)
    assert moments.rms(x).dtype == jnp.float32
    assert_close(moments.rms(x), np.float64(1 + 2**-7))
