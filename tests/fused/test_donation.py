"""`step.jit` donates parameters and state, so each of their arrays needs memory of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import slow

from adalomo_jax import adalomo, fuse

X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
W = jnp.linspace(0.1, 1.0, 16).reshape(4, 4)


def loss_fn(params, *args):
    h = X @ params["in"]
    h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["layers"])[0]
    return jnp.mean((h @ params["out"].T) ** 2) + sum(jnp.sum(x) for x in jax.tree.leaves(args))


def params():
    return {"in": W + 0.0, "out": W + 1.0, "layers": jnp.stack([W, W])}


def keeps(make):
    return optax.GradientTransformation(make, lambda updates, state, params=None: (updates, state))


STATES = {
    "the parameters": keeps(lambda params: params),
    "zeros twice": keeps(lambda params: [(z, z) for z in [jax.tree.map(jnp.zeros_like, params)]]),
    "cocob": optax.contrib.cocob(),
}


@pytest.mark.parametrize(
    ("state", "mesh"),
    [*((state, None) for state in STATES), ("the parameters", 2), slow("zeros twice", 2), slow("cocob", 2)],
)
def test_a_state_that_shares_memory_gets_its_own(state, mesh):
    now, tx = params(), STATES[state]
    if mesh:
        devices = jax.make_mesh((mesh,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:mesh])
        now = jax.device_put(now, jax.NamedSharding(devices, jax.P(None, "d")))
    step = fuse(loss_fn, tx)
    made = step.init(now)
    result = step.jit(now, made)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((now, made)))
    expected = optax.with_extra_args_support(tx).init(params())
    for x, y in zip(jax.tree.leaves(result.state.inner), jax.tree.leaves(expected), strict=True):
        assert x.shape == y.shape
    assert np.isfinite(result.loss)


TWICE = {
    "in the parameters": (lambda p: {**p, "out": p["in"]}, (), r"params\['in'\] and params\['out'\] are one array"),
    "on one buffer": (
        lambda p: {**p, "out": jax.device_put(p["in"], p["in"].sharding)},
        (),
        r"params\['in'\] and params\['out'\] are one array",
    ),
}


@pytest.mark.parametrize("case", TWICE)
def test_refuses_one_array_under_two_names(case):
    twice, args, message = TWICE[case]
    now, step = twice(params()), fuse(loss_fn, adalomo(1e-2))
    state = step.init(now, *args)
    with pytest.raises(ValueError, match=message):
        step.jit(now, state, *args)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((now, state)))


def test_refuses_parameters_among_the_arguments_of_the_loss():
    now, step = params(), fuse(loss_fn, adalomo(1e-2))
    with pytest.raises(ValueError, match=r"params\['in'\] and args\[0\]\['kept'\] are one array.*jnp.copy"):
        step.jit(now, step.init(now, {"kept": now["in"]}), {"kept": now["in"]})
    kept = jnp.copy(now["in"])
    assert np.isfinite(step.jit(now, step.init(now, kept, kept), kept, kept).loss)  # arguments may repeat an array


def test_refuses_a_state_with_one_array_twice():
    now, step = params(), fuse(loss_fn, optax.adam(1e-2))
    state = step.init(now)
    adam = state.inner[0]
    same = state._replace(inner=(adam._replace(mu=adam.nu), *state.inner[1:]))
    with pytest.raises(ValueError, match=r"state.inner\[0\].mu\['in'\] and state.inner\[0\].nu\['in'\] are one array"):
        step.jit(now, same)


def test_one_leaf_that_the_loss_reads_twice_is_tied():
    tied = {"in": W + 0.0, "layers": jnp.stack([W, W])}
    step = fuse(lambda p: loss_fn({**p, "out": p["in"]}), adalomo(1e-2))
    assert np.isfinite(step.jit(tied, step.init(tied)).loss)
