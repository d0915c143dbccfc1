"""Weights in int8 or 24 bits in Linen's and NNX's loops: trained, shown, evaluated, saved and restored."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx, serialization
from tiers import slow

from adalomo_jax import Float24, Int8, adalomo, float24, floats, fuse, int8
from adalomo_jax.linen import TrainState
from adalomo_jax.nnx import FusedOptimizer

WIDTH, LAYERS = 16, 4
X = jnp.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)
IS_KERNEL = lambda path: path.endswith("layers/up/kernel")
FORMS: dict[str, Any] = {
    "int8": (functools.partial(int8, block=4, where=IS_KERNEL), Int8),
    "bf16+8": (functools.partial(float24, where=IS_KERNEL), Float24),
}


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(WIDTH, name="up")(x)), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(LinenBlock), variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return nn.Dense(4)(layers(name="layers")(x, None)[0])


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.up(x))


class NNXModel(nnx.Module):
    def __init__(self):
        make = nnx.split_rngs(splits=LAYERS)(nnx.vmap(NNXBlock))
        self.layers = make(nnx.Rngs(0))
        self.head = nnx.Linear(WIDTH, 4, rngs=nnx.Rngs(1))

    def __call__(self, x):
        run = nnx.scan(nnx.remat(lambda x, layer: layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(run(x, self.layers))


@pytest.mark.parametrize("form", [slow("int8"), "bf16+8"])
def test_linen(form):
    encode, kind = FORMS[form]
    model: Any = LinenModel()
    loss_fn = lambda params, x: jnp.mean(jnp.square(model.apply({"params": params}, x) - 1))
    params = encode(model.init(jax.random.key(0), X)["params"])
    state = TrainState.create(X, loss_fn=loss_fn, params=jax.tree.map(jnp.copy, params), tx=adalomo(1e-2))
    step = fuse(loss_fn, adalomo(1e-2))
    expected, expected_state = params, step.init(params, X)
    for _ in range(3):
        state, _ = state.step(X)
        expected, expected_state, *_ = step.jit(expected, expected_state, X)
    chex.assert_trees_all_equal(state.params, expected)
    assert isinstance(state.params["layers"]["up"]["kernel"], kind)
    saved = serialization.to_bytes(state)
    fresh = TrainState.create(X, loss_fn=loss_fn, params=jax.tree.map(jnp.zeros_like, expected), tx=adalomo(1e-2))
    restored: Any = serialization.from_bytes(fresh, saved)
    chex.assert_trees_all_equal(restored.params, state.params)
    chex.assert_trees_all_equal(restored.step(X)[0].params, state.step(X)[0].params)


@pytest.mark.parametrize("form", ["int8", slow("bf16+8")])
def test_nnx(form):
    encode, kind = FORMS[form]
    loss_fn = lambda model, x: jnp.mean(jnp.square(model(x) - 1))
    model, reference = NNXModel(), NNXModel()
    nnx.update(model, encode(nnx.as_pure(nnx.state(model, nnx.Param))))
    nnx.update(reference, jax.tree.map(jnp.copy, floats(nnx.as_pure(nnx.state(model, nnx.Param)))))
    optimizer, of_floats = (FusedOptimizer(m, adalomo(1e-2), loss_fn, X) for m in (model, reference))
    losses = [(optimizer.step(model, X).loss, of_floats.step(reference, X).loss) for _ in range(3)]
    for loss, expected in losses:
        chex.assert_trees_all_close(loss, expected, rtol=2e-2)
    assert losses[-1][0] < 0.9 * losses[0][0]  # it has moved by more than that
    assert isinstance(nnx.as_pure(nnx.state(model, nnx.Param))["layers"]["up"]["kernel"], kind)
    assert f"in {form}" in str(optimizer.plan(model, X))
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model)))
    chex.assert_trees_all_close(optimizer.loss(model, X), of_floats.loss(reference, X), rtol=2e-2)
    chex.assert_trees_all_close(of_floats.loss(reference, X), loss_fn(reference, X), rtol=1e-5)
    chex.assert_trees_all_equal(nnx.as_pure(nnx.state(model)), before)
    nnx.update(model, floats(nnx.as_pure(nnx.state(model, nnx.Param))))
    chex.assert_trees_all_close(loss_fn(model, X), loss_fn(reference, X), rtol=2e-2)
