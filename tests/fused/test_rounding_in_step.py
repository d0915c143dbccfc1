"""The fused step rounds narrow weights stochastically by default, to the same bits as unfused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import RELATIVE_ERROR, RULES, relative_error
from language_model import batch, init_params, make_loss
from small_model import small_loss, small_params
from tiers import slow

from adalomo_jax import fuse, lomo


def unit_distance(a, b):
    """The distance between 16-bit floats, in representable numbers."""

    def ordinal(x):
        bits = np.asarray(x).view(np.int16).astype(np.int32)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    return np.concatenate(
        [np.abs(ordinal(x) - ordinal(y)).ravel() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    )


@functools.cache
def one_step(rule, *, dtype=jnp.bfloat16, remat=None, unfused=False, count=0, **options):
    """The parameters after a step of the language model if `remat` is given, otherwise of the small model."""
    make_params, loss_fn = (init_params, make_loss(remat)) if remat else (small_params, small_loss)
    params, tokens = make_params(4, dim=32, hidden=48, tied=True, dtype=dtype), batch(length=32)
    step = fuse(loss_fn, rule, **options)
    state = step.init(params, tokens)._replace(count=jnp.int32(count))
    return jax.jit(step.unfused if unfused else step)(params, state, tokens).params


@pytest.mark.parametrize(
    ("rule", "remat", "dtype"),
    [("adalomo", "remat", jnp.bfloat16)]
    + [slow("lomo", "no remat", jnp.float16), slow("adamw", "dots saved", jnp.bfloat16)]
    + [slow(rule, "remat", jnp.bfloat16) for rule in RULES if rule != "adalomo"]
    + [slow("adalomo", "remat", jnp.float16)]
    + [slow("adalomo", remat, jnp.bfloat16) for remat in ("no remat", "dots saved")],
)
def test_equals_the_unfused_step(rule, remat, dtype):
    fused, unfused = (one_step(RULES[rule], remat=remat, unfused=u, dtype=dtype) for u in (False, True))
    distance = unit_distance(fused, unfused)
    assert distance.max() <= 1 and np.mean(distance > 0) <= 0.01


def test_the_comparison_sees_other_keys():
    distance = unit_distance(one_step(RULES["adalomo"]), one_step(RULES["adalomo"], unfused=True, seed=1))
    assert np.mean(distance > 0) > 0.01


@pytest.mark.parametrize("change", [{"seed": 1}, {"count": 1}, {"stochastic_rounding": False}])
def test_bits_come_from_seed_and_step(change):
    again = one_step.__wrapped__(RULES["lomo"])
    assert unit_distance(one_step(RULES["lomo"]), again).max() == 0
    assert unit_distance(one_step(RULES["lomo"]), one_step(RULES["lomo"], **change)).max() > 0


def test_layers_and_leaves_are_rounded_with_their_own_keys():
    """Weights and updates are equal. Two layers or leaves with the same key would stay equal."""
    layers = {name: jnp.full((3, 64), 1.0, jnp.bfloat16) for name in "ab"}

    def loss_fn(params):
        body = lambda x, w: (x + w["a"] + w["b"], None)
        return jnp.sum(jax.lax.scan(body, jnp.zeros(64, jnp.bfloat16), params)[0])

    step = fuse(loss_fn, lomo(1e-3))
    params = jax.jit(step)(layers, step.init(layers)).params
    rows = np.concatenate([np.asarray(params[name].astype(jnp.float32)) for name in "ab"])
    assert len(np.unique(rows, axis=0)) == 6
    assert np.unique(rows).size == 2  # the two neighbours of 0.999


def test_small_steps_arrive_on_average():
    params = {"w": jnp.ones((512, 64), jnp.bfloat16)}
    loss_fn = lambda params: jnp.sum(params["w"].astype(jnp.float32))
    means = {}
    for stochastic in (None, False):
        step = fuse(loss_fn, lomo(1e-4), stochastic_rounding=stochastic)
        now, state = params, step.init(params)
        for _ in range(10):
            now, state, *_ = jax.jit(step)(now, state)
        means[stochastic] = float(jnp.mean(now["w"].astype(jnp.float32)))
    assert means[False] == 1.0
    assert abs(means[None] - 0.999) < 1e-4


def test_float32_weights_are_rounded_to_nearest():
    apart = [one_step(RULES["adalomo"], dtype=jnp.float32, stochastic_rounding=s) for s in (None, False)]
    assert relative_error(*apart) == 0.0
    moved = one_step(RULES["adalomo"], dtype=jnp.float32, seed=5)
    assert relative_error(apart[0], moved) < RELATIVE_ERROR


def test_refuses_to_round_what_needs_none():
    with pytest.raises(ValueError, match="there are none among those that are trained"):
        one_step(RULES["adalomo"], dtype=jnp.float32, stochastic_rounding=True)
    one_step(RULES["adalomo"], dtype=jnp.bfloat16, stochastic_rounding=True)
