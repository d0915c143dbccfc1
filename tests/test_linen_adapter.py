"""The Linen train state is a value, steps in place, and is saved and restored like Flax's own."""

import functools
import inspect
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from tiers import slow

from adalomo_jax import adalomo, fuse
from adalomo_jax.linen import TrainState

WIDTH, LAYERS = 8, 3
X = jax.random.normal(jax.random.key(0), (4, WIDTH))
KEY = jax.random.key(1)
TRANSFORMATIONS = {"adalomo": adalomo(1e-2), "adamw": optax.adamw(1e-2)}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.BatchNorm(use_running_average=False)(nn.Dense(WIDTH, use_bias=False)(x))
        return x + nn.Dropout(0.5, deterministic=False)(jnp.tanh(y)), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Block, {"params": 0, "batch_stats": 0}, split_rngs={"params": True, "dropout": True}, length=LAYERS
        )
        return nn.Dense(1)(layers()(x, None)[0])


model = Model()


def loss_fn(params, x, batch_stats, key):
    variables = {"params": params, "batch_stats": batch_stats}
    out, new = model.apply(variables, x, mutable=["batch_stats"], rngs={"dropout": key})
    return jnp.mean((out - jnp.sin(x[:, :1])) ** 2), new["batch_stats"]


VARIABLES = jax.tree.map(np.asarray, jax.jit(model.init)({"params": jax.random.key(2), "dropout": KEY}, X))


def variables():
    """Fresh arrays, because a step donates those of the parameters."""
    return jax.tree.map(jnp.array, (VARIABLES["params"], VARIABLES["batch_stats"]))


def make(tx=TRANSFORMATIONS["adalomo"], loss_fn=loss_fn, **options):
    params, batch_stats = variables()
    options = {"has_aux": True, "apply_fn": model.apply, **options}
    return TrainState.create(X, batch_stats, KEY, loss_fn=loss_fn, params=params, tx=tx, **options), batch_stats


@functools.cache
def template(name):
    return make(TRANSFORMATIONS[name])


def start(name="adalomo") -> tuple[Any, Any]:
    """A fresh state and its batch_stats. States of one name share one step, which compiles once."""
    return jax.tree.map(jnp.copy, template(name))


def run(state, batch_stats, steps):
    result: Any = None
    for _ in range(steps):
        state, result = state.step(X, batch_stats, jax.random.fold_in(KEY, state.count))
        batch_stats = result.aux
    return state, batch_stats, result


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.slow
def test_equals_fuse_and_its_unfused_twin():
    state, batch_stats, result = run(*start(), 4)
    step = fuse(loss_fn, TRANSFORMATIONS["adalomo"], has_aux=True)
    for call, tolerance in ((step, 0), (step.unfused, 1e-5)):
        params, stats = variables()
        fused_state, jitted, expected = step.init(params, X, stats, KEY), jax.jit(call), None
        for i in range(4):
            expected = jitted(params, fused_state, X, stats, jax.random.fold_in(KEY, i))
            params, fused_state, stats = expected.params, expected.state, expected.aux
        assert expected is not None
        actual = (state.params, batch_stats, result.loss, result.metrics)
        chex.assert_trees_all_close(
            actual, (params, stats, expected.loss, expected.metrics), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("skips_a_step", [slow(False), True])
def test_equals_an_optax_loop(skips_a_step):
    state, batch_stats, _ = run(*start("adamw"), 4)
    tx, (params, stats) = TRANSFORMATIONS["adamw"], variables()
    opt_state, gradient = tx.init(params), jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    for i in range(4):
        (_, stats), grads = gradient(params, X, stats, jax.random.fold_in(KEY, i))
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates) if not (skips_a_step and i == 2) else params
    equal = [np.allclose(a, b, 1e-5, 1e-6) for a, b in zip(*map(jax.tree.leaves, (state.params, params)))]
    assert not any(equal) if skips_a_step else all(equal)
    if not skips_a_step:
        chex.assert_trees_all_close(batch_stats, stats, rtol=1e-5)


def test_layers_of_the_scan_are_updated_one_by_one():
    state, batch_stats = start()
    layers = {leaf.path: leaf.layers for leaf in state.plan(X, batch_stats, KEY).leaves}
    assert all(n == (LAYERS if "Scan" in path else None) for path, n in layers.items())


def test_many_steps_trace_once():
    calls = []

    def counted(*args):
        calls.append(args)
        return loss_fn(*args)

    state, batch_stats, _ = run(*make(loss_fn=counted), 1)
    traced = len(calls)
    state, *_ = run(state, batch_stats, 4)
    assert len(calls) == traced and int(state.count) == 5


def test_the_old_state_is_gone_and_other_arguments_stay():
    state, batch_stats = start()
    old = jax.tree.leaves((state.params, state.opt_state))
    run(state, batch_stats, 1)
    assert all(x.is_deleted() for x in old)
    assert not any(x.is_deleted() for x in jax.tree.leaves(batch_stats))


@pytest.mark.uncached
def test_updates_in_place():
    state, batch_stats = start()
    memory = state.lower(X, batch_stats, KEY).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes((state.params, state.opt_state))


@pytest.mark.uncached
def test_is_part_of_the_users_jit_in_place():
    traces = []

    def train(state, x, batch_stats):
        traces.append(x)
        return state.step(x, batch_stats, jax.random.fold_in(KEY, state.count))

    jitted = jax.jit(train, donate_argnums=0)
    expected, *_ = run(*start(), 3)
    state, batch_stats = start()
    memory: Any = jitted.lower(state, X, batch_stats).compile().memory_analysis()
    updated = nbytes((state.params, state.opt_state))
    assert memory.alias_size_in_bytes >= updated
    assert memory.output_size_in_bytes < updated + nbytes(batch_stats) + 100 * len(jax.tree.leaves(state))
    traces.clear()
    for _ in range(3):
        state, result = jitted(state, X, batch_stats)
        batch_stats = result.aux
    assert len(traces) <= 1
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_serialization_round_trip_repeats_the_same_bits(name):
    state, batch_stats, _ = run(*start(name), 2)
    saved: Any = serialization.msgpack_serialize(serialization.to_state_dict(jax.tree.map(np.asarray, state)))
    fresh, _ = start(name)
    restored: Any = serialization.from_state_dict(fresh, dict(serialization.msgpack_restore(saved)))
    assert int(restored.count) == 2
    chex.assert_trees_all_equal(run(restored, batch_stats, 2)[0].params, run(state, batch_stats, 2)[0].params)


def test_orbax_round_trip_repeats_the_same_bits(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    state, batch_stats, _ = run(*start(), 2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", start()[0])
    assert int(restored.count) == 2
    chex.assert_trees_all_equal(run(restored, batch_stats, 2)[0].params, run(state, batch_stats, 2)[0].params)


def test_dropout_and_batch_norm_are_at_work():
    state, batch_stats = start()
    initial = jax.tree.map(np.asarray, batch_stats)
    state, after, first = run(state, batch_stats, 1)
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (initial, after))))
    _, other_key = start()[0].step(X, batch_stats, jax.random.key(9))
    assert float(first.loss) != float(other_key.loss)


def test_a_subclass_carries_more():
    class WithStats(TrainState):
        batch_stats: Any = None

    params, batch_stats = variables()
    state: Any = WithStats.create(
        X, batch_stats, KEY, loss_fn=loss_fn, params=params, tx=adalomo(1e-2), apply_fn=model.apply, has_aux=True
    ).replace(batch_stats=batch_stats)
    state, result = state.step(X, state.batch_stats, KEY)
    state = state.replace(batch_stats=result.aux)
    assert isinstance(state, WithStats) and state.apply_fn == model.apply
    assert jax.tree.structure(state.batch_stats) == jax.tree.structure(batch_stats)


def test_starts_from_shapes():
    params, batch_stats = variables()
    shapes = jax.eval_shape(lambda: (X, batch_stats, KEY))
    state = TrainState.create(*shapes, loss_fn=loss_fn, params=params, tx=adalomo(1e-2), has_aux=True)
    chex.assert_trees_all_equal(state.opt_state, start()[0].opt_state)


def test_options_reach_fuse():
    with pytest.raises(ValueError, match="stochastic_rounding=True"):
        state, batch_stats = make(stochastic_rounding=True)
        run(state, batch_stats, 1)
    with pytest.raises(TypeError):
        make(no_such_option=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda params, x, *_: (x @ x.T, None), "float scalar"),
        (lambda params, x, *_: (x.sum(), None, None), "must return"),
        (lambda params, x, *_: x.sum(), "must return"),
    ],
)
def test_refuses_a_loss_that_is_no_scalar(wrong, message):
    with pytest.raises(ValueError, match=message):
        make(loss_fn=wrong)


def test_refuses_a_state_of_another_model():
    state, batch_stats = start()
    with pytest.raises(ValueError, match="state"):
        state.replace(opt_state=state.opt_state._replace(inner=())).step(X, batch_stats, KEY)


def test_looks_like_flax():
    """It has the fields of Flax's state except `step`, which counts there, and `tx`, which is in the step."""
    from flax.training.train_state import TrainState as Flax

    shared = {"params", "opt_state", "apply_fn"}
    assert shared <= set(TrainState.__dataclass_fields__) & set(Flax.__dataclass_fields__)
    assert {"apply_fn", "params", "tx"} <= set(inspect.signature(TrainState.create).parameters)
