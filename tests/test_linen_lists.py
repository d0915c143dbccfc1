"""The train state stacks layers that a Linen model calls in a Python loop; all else sees the caller's tree."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState as Flax
from tiers import slow

from adalomo_jax import adalomo
from adalomo_jax.fused import InStack
from adalomo_jax.linen import TrainState

WIDTH, LAYERS, STEPS = 8, 4, 5
X = jax.random.normal(jax.random.key(0), (4, WIDTH))
KEY = jax.random.key(1)
TX = adalomo(1e-2)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(WIDTH)(nn.relu(nn.Dense(2 * WIDTH)(x)))


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.BatchNorm(use_running_average=False)(nn.Dense(WIDTH, use_bias=False)(x))
        return x + nn.Dropout(0.3, deterministic=False)(jnp.tanh(y))


class Model(nn.Module):
    block: Any = Plain
    remat: bool = True

    @nn.compact
    def __call__(self, x):
        block = nn.remat(self.block) if self.remat else self.block
        for i in range(LAYERS):
            x = block(name=f"Block_{i}")(x)
        return nn.Dense(WIDTH)(x)


def loss_of(model):
    def loss_fn(params, x, stats, key):
        variables = {"params": params, **stats}
        out, new = model.apply(variables, x, mutable=["batch_stats"], rngs={"dropout": key})
        return jnp.mean(jnp.square(out - jnp.sin(x))), dict(new)

    return loss_fn


MODEL = Model()


def start(model=MODEL, **options) -> tuple[Any, Any, Any]:
    """A state, Flax's own state for the same model, and its collections beside the parameters."""
    variables = dict(jax.jit(model.init)({"params": jax.random.key(2), "dropout": KEY}, X))
    params, loss_fn = variables.pop("params"), loss_of(model)
    theirs = Flax.create(apply_fn=model.apply, params=jax.tree.map(jnp.copy, params), tx=TX)
    options = {"roll": 4, "apply_fn": model.apply, **options}
    state = TrainState.create(X, variables, KEY, loss_fn=loss_fn, params=params, tx=TX, has_aux=True, **options)
    return state, theirs, variables


def run(state, stats, steps):
    for _ in range(steps):
        state, result = state.step(X, stats, jax.random.fold_in(KEY, state.count))
        stats = result.aux
    return state, stats


@pytest.mark.parametrize(
    ("block", "remat"),
    [(Noisy, True), slow(Plain, True), slow(Plain, False), slow(Noisy, False)],
)
def test_equals_flax_and_optax(block, remat):
    """Under nn.remat, too, each layer makes its dropout key from a different number."""
    model = Model(block, remat)
    state, theirs, stats = start(model)
    its_stats, before = stats, theirs.params
    gradient = jax.jit(jax.value_and_grad(loss_of(model), has_aux=True))
    of_blocks = [leaf for leaf in state.plan(X, stats, KEY).leaves if leaf.path.startswith("Block")]
    assert {leaf.layers for leaf in of_blocks} == {LAYERS}
    for i in range(STEPS):
        state, stats = run(state, stats, 1)
        (_, its_stats), grads = gradient(theirs.params, X, its_stats, jax.random.fold_in(KEY, i))
        theirs = theirs.apply_gradients(grads=grads)
        chex.assert_trees_all_close((state.unplaced_params, stats), (theirs.params, its_stats), rtol=1e-5, atol=1e-6)
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), before, theirs.params)
    assert min(jax.tree.leaves(moved)) > 1e-5


def test_the_model_is_applied_to_unplaced_params():
    state, theirs, stats = start()
    apply = lambda state, x: state.apply_fn({"params": state.unplaced_params}, x)
    expected: Any = MODEL.apply({"params": theirs.params}, X)
    np.testing.assert_allclose(apply(state, X), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(apply)(run(state, stats, 0)[0], X), expected, rtol=1e-5)
    assert state.params["Block_2"]["Dense_0"]["bias"] == InStack("['Block_0']['Dense_0']['bias']", 2)


def test_without_roll_params_are_the_callers():
    state, theirs, stats = start(roll=False)
    state, _ = run(state, stats, 1)
    chex.assert_trees_all_equal_shapes(state.params, theirs.params)
    chex.assert_trees_all_equal(state.unplaced_params, state.params)


def by_flax(state, fresh, folder):
    saved: Any = serialization.msgpack_serialize(serialization.to_state_dict(jax.tree.map(np.asarray, state)))
    return serialization.from_state_dict(fresh, dict(serialization.msgpack_restore(saved)))


def by_orbax(state, fresh, folder):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", fresh)


@pytest.mark.parametrize("round_trip", [by_flax, by_orbax])
def test_saved_and_restored_it_repeats_the_same_bits(round_trip, tmp_path):
    state, _, stats = start()
    state, stats = run(state, stats, 2)
    restored = round_trip(state, state.replace(**jax.tree.map(jnp.zeros_like, vars_of(state))), tmp_path)
    assert int(restored.count) == 2
    assert jax.tree.structure(restored.params) == jax.tree.structure(state.params)
    chex.assert_trees_all_equal(run(restored, stats, 2)[0].params, run(state, stats, 2)[0].params)


def vars_of(state):
    return {"params": state.params, "opt_state": state.opt_state}


@pytest.mark.slow
def test_weights_from_elsewhere_are_placed():
    state, theirs, stats = start()
    new = jax.tree.map(lambda x: x + 1, theirs.params)
    state = state.replace(params=state.fused.place(new, X, stats, KEY))
    chex.assert_trees_all_equal(state.unplaced_params, new)
    assert int(run(state, stats, 1)[0].count) == 1


def test_a_tx_that_demands_an_argument_by_name():
    update: Any = lambda updates, state, params=None, *, rate, **_: (jax.tree.map(lambda g: -rate * g, updates), state)
    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params = {"layers": [0.1 * jnp.eye(X.shape[-1]) for _ in range(4)]}

    def loss_fn(params, x):
        for w in params["layers"]:
            x = x + jnp.tanh(x @ w)
        return jnp.mean(jnp.square(x))

    expected = jax.tree.map(lambda w, g: w - 0.2 * g, params, jax.grad(loss_fn)(params, X))
    state = TrainState.create(X, loss_fn=loss_fn, params=params, tx=tx, roll=4, extra_args={"rate": 0.1})
    state, _ = state.step(X, rate=0.2)
    assert any(leaf.layer_paths for leaf in state.fused.plan(state.params, X).leaves)
    chex.assert_trees_all_close(state.unplaced_params, expected, rtol=1e-5, atol=1e-6)
