"""The rules in Flax's own training loops equal plain Optax on a tree of arrays."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from tiers import slow
from tolerances import assert_apart, assert_close

from adalomo_jax import adalomo, lomo, per_layer

AXES = {"bias": None, "head": None, "layers": 0}


def by_rank(params: Any) -> Any:
    return jax.tree.map(lambda p: 0 if p.ndim == 3 else None, params)


RULES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adalomo": lambda: adalomo(0.1, weight_decay=0.1),
    "adalomo with layer_axes": lambda: adalomo(lambda step: 0.1 / (1.0 + step), layer_axes=AXES),
    "adalomo with callable layer_axes": lambda: adalomo(0.1, layer_axes=by_rank),
    "lomo": lambda: lomo(lambda step: 0.1 / (1.0 + step), clip_value=0.5),
    "per_layer of adalomo": lambda: per_layer(adalomo(0.1), AXES),
    "per_layer of lomo": lambda: per_layer(lomo(0.1, weight_decay=0.1), AXES),
}
RUN_EAGERLY = ["adalomo", "lomo", "per_layer of lomo"]
"""These also run operation by operation, which is slow; every rule runs as one program, without ``-m slow`` too."""
each = pytest.mark.parametrize("name, jit", [*((name, True) for name in RULES), *(slow(n, False) for n in RUN_EAGERLY)])
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
STEPS = 3


def arrays() -> dict[str, jax.Array]:
    draw = np.random.default_rng(0).standard_normal
    shapes = {"bias": (4,), "head": (4, 2), "layers": (3, 4, 4)}
    sizes = {"layers": np.array([0.1, 0.5, 2.0]).reshape(3, 1, 1)}
    return {name: jnp.asarray(draw(shape) * sizes.get(name, 1.0), jnp.float32) for name, shape in shapes.items()}


def loss_fn(params: Any) -> jax.Array:
    x = X
    for k in range(3):
        x = x + jnp.tanh(x @ params["layers"][k])
    return jnp.mean(((x + params["bias"]) @ params["head"] - 1.0) ** 2)


@functools.cache
def plain(name: str) -> Any:
    """The parameters and the state after each step of Optax alone."""
    tx, params, trajectory = RULES[name](), arrays(), []
    update = jax.jit(lambda params, state: tx.update(jax.grad(loss_fn)(params), state, params))
    state = tx.init(params)
    for _ in range(STEPS):
        updates, state = update(params, state)
        params = optax.apply_updates(params, updates)
        trajectory.append((params, jax.tree.leaves(state)))
    return trajectory


class Model(nnx.Module):
    def __init__(self):
        self.bias, self.head, self.layers = map(nnx.Param, arrays().values())

    def __call__(self) -> jax.Array:
        return loss_fn({"bias": self.bias[...], "head": self.head[...], "layers": self.layers[...]})


def train_nnx(name: str, jit: bool) -> Any:
    model = Model()
    optimizer = nnx.Optimizer(model, RULES[name](), wrt=nnx.Param)

    def step(model: Model, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(lambda m: m())(model))

    step = nnx.jit(step) if jit else step
    for _ in range(STEPS):
        step(model, optimizer)
    return model, optimizer


@each
def test_an_nnx_optimizer_equals_plain_optax(name: str, jit: bool):
    model, optimizer = train_nnx(name, jit)
    params, state = plain(name)[-1]
    assert_close(dict(nnx.to_pure_dict(nnx.state(model, nnx.Param))), params)
    assert_close(jax.tree.leaves(nnx.as_pure(optimizer.opt_state)), state)
    assert_apart(dict(nnx.to_pure_dict(nnx.state(model, nnx.Param))), plain(name)[-2][0])


@pytest.mark.parametrize(
    "name, jit", [(name, True) for name in RULES if "layer_axes" not in name] + [slow("lomo", False)]
)
def test_an_nnx_model_and_optimizer_equals_plain_optax(name: str, jit: bool):
    both = nnx.ModelAndOptimizer(Model(), RULES[name](), wrt=nnx.Param)

    def step(both: Any) -> None:
        both.update(nnx.grad(lambda m: m())(both.model))

    step = nnx.jit(step) if jit else step
    for _ in range(STEPS):
        step(both)
    assert_close(dict(nnx.to_pure_dict(nnx.state(both.model, nnx.Param))), plain(name)[-1][0])


@each
def test_a_train_state_of_linen_equals_plain_optax(name: str, jit: bool):
    step: Any = lambda state: state.apply_gradients(grads=jax.grad(loss_fn)(state.params))
    step = jax.jit(step) if jit else step
    state = TrainState.create(apply_fn=loss_fn, params=arrays(), tx=RULES[name]())
    for _ in range(STEPS):
        state = step(state)
    params, leaves = plain(name)[-1]
    assert_close(state.params, params)
    assert_close(jax.tree.leaves(state.opt_state), leaves)


def test_each_part_of_the_state_is_a_tree_like_the_parameters():
    """So whatever holds one array for each parameter can hold each part. Optax's adafactor sets the standard."""
    params = arrays()
    ours: Any = adalomo(0.1).init(params)
    theirs: Any = optax.adafactor(0.1, min_dim_size_to_factor=1).init(params)
    for name in ("v_row", "v_col", "v"):
        assert jax.tree.structure(getattr(ours[0], name)) == jax.tree.structure(getattr(theirs[0], name))
    assert jax.tree.map(jnp.shape, ours[0].v) == jax.tree.map(jnp.shape, theirs[0].v)


def test_an_abstract_nnx_model_has_an_abstract_state():
    abstract: Any = nnx.eval_shape(lambda: nnx.Optimizer(Model(), RULES["adalomo with layer_axes"](), wrt=nnx.Param))
    _, optimizer = train_nnx("adalomo with layer_axes", True)
    shapes = lambda o: [(x.shape, x.dtype) for x in jax.tree.leaves(nnx.as_pure(nnx.state(o)))]
    assert shapes(abstract) == shapes(optimizer)
