"""adalomo updates attention's kernels as matrices wherever it runs: under fuse, in Flax's loops, on meshes."""

import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from attention_kernels import DNH, LR, NHD, OUT, QUERY, by_path, gaussian, nested
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiers import slow
from tolerances import assert_apart, assert_close

from adalomo_jax import adalomo, fuse, per_layer
from adalomo_jax.linen import TrainState
from adalomo_jax.nnx import FusedOptimizer

LAYERS = 3


def stack(seed: int, axis: int) -> Any:
    """Stacks of attention's kernels as MaxText has them, with a layer axis."""
    q, o = gaussian((LAYERS, 12, 3, 4), seed), gaussian((LAYERS, 3, 4, 12), seed + 1)
    as_stack = lambda x: {"kernel": jnp.asarray(np.moveaxis(x / 4, 0, axis))}
    return {"self_attention": {"query": as_stack(q), "out": as_stack(o)}}


def attend(params: Any, x: jax.Array, axis: int) -> jax.Array:
    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        q, o = w["self_attention"]["query"]["kernel"], w["self_attention"]["out"]["kernel"]
        return x + jnp.einsum("bnh,nhd->bd", jnp.tanh(jnp.einsum("bd,dnh->bnh", x, q)), o), None

    x, _ = jax.lax.scan(layer, x, jax.tree.map(lambda w: jnp.moveaxis(w, axis, 0), params))
    return jnp.mean((x - 1) ** 2)


X = gaussian((5, 12), 7)


@functools.cache
def layers_as_matrices() -> dict[str, np.ndarray]:
    """The stack after three steps of plain Optax on a list of matrices."""
    kernel_of = {"query": (12, 3, 4), "out": (3, 4, 12)}
    matrix_of = {"query": (12, 12), "out": (12, 12)}
    at = lambda i: {
        name: stack(0, 0)["self_attention"][name]["kernel"][i].reshape(matrix_of[name]) for name in matrix_of
    }

    def loss_fn(layers: list[Any]) -> jax.Array:
        stacked = {n: {"kernel": jnp.stack([w[n].reshape(kernel_of[n]) for w in layers])} for n in kernel_of}
        return attend({"self_attention": stacked}, jnp.asarray(X), 0)

    found: Any = [at(i) for i in range(LAYERS)]
    tx = adalomo(LR)
    step, state = jax.jit(lambda p, s: tx.update(jax.grad(loss_fn)(p), s, p)), tx.init(found)
    for _ in range(3):
        updates, state = step(found, state)
        found = optax.apply_updates(found, updates)
    return {name: np.stack([np.reshape(w[name], kernel_of[name]) for w in found]) for name in kernel_of}


def by_fuse(axis: int) -> tuple[Any, Any]:
    step = fuse(lambda params, x: attend(params, x, axis), adalomo(LR), strict=True)
    params = stack(0, axis)
    state = step.init(params, X)
    for _ in range(3):
        params, state, *_ = step.jit(params, state, X)
    return params, state.inner


def by_optax(axis: int, tx: optax.GradientTransformation) -> tuple[Any, Any]:
    params = stack(0, axis)
    state = tx.init(params)
    step = jax.jit(lambda p, s: tx.update(jax.grad(attend)(p, X, axis), s, p))
    for _ in range(3):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    return params, state


WAYS: dict[str, Callable[[int], Any]] = {
    "fuse": by_fuse,
    "layer_axes": lambda axis: by_optax(axis, adalomo(LR, layer_axes=axis)),
    "layer_axes and a tree": lambda axis: by_optax(
        axis,
        adalomo(LR, layer_axes=axis, matrix_axes={"self_attention": {"query": QUERY, "out": OUT}}),
    ),
    "per_layer": lambda axis: by_optax(axis, per_layer(adalomo(LR), axis)),
}


@pytest.mark.parametrize(
    "way, axis", [("fuse", 0), ("fuse", 1), ("layer_axes", 1), ("layer_axes and a tree", 0), slow("per_layer", 0)]
)
def test_each_layer_of_a_stack_is_its_matrices(way: str, axis: int):
    """The matrix axes for a stack of rank 4 are those of a layer, of rank 3."""
    params, state = WAYS[way](axis)
    found = {name: np.moveaxis(x["kernel"], axis, 0) for name, x in params["self_attention"].items()}
    assert_close(found, layers_as_matrices())
    shapes = {path: x.shape for path, x in by_path((state[0].v_row, state[0].v_col)).items()}
    assert shapes == {
        "0/self_attention/query/kernel": (LAYERS, 12), "0/self_attention/out/kernel": (LAYERS, 3, 4),
        "1/self_attention/query/kernel": (LAYERS, 3, 4), "1/self_attention/out/kernel": (LAYERS, 12),
    }  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, slow({"matrix_axes": [{"self_attention": {"query": QUERY, "out": OUT}}] * LAYERS})]
)
def test_each_layer_of_a_list_that_fuse_stacks_is_its_matrices(options: dict[str, Any]):
    def loss_fn(layers: list[Any], x: jax.Array) -> jax.Array:
        for w in layers:
            q, o = (w["self_attention"][name]["kernel"] for name in ("query", "out"))
            x = x + jnp.einsum("bnh,nhd->bd", jnp.tanh(jnp.einsum("bd,dnh->bnh", x, q)), o)
        return jnp.mean((x - 1) ** 2)

    layers = [jax.tree.map(lambda w, i=i: w[i], stack(0, 0)) for i in range(LAYERS)]
    step = fuse(loss_fn, adalomo(LR, **options), roll=LAYERS)
    params = step.place(layers, X)
    state = step.init(params, X)
    assert state.inner[0].v_col[0]["self_attention"]["query"]["kernel"].shape == (LAYERS, 3, 4)
    for _ in range(3):
        params, state, *_ = step.jit(params, state, X)
    of_stack = params[0]["self_attention"]
    assert_close({name: of_stack[name]["kernel"] for name in ("query", "out")}, layers_as_matrices())


def test_a_stack_over_its_last_two_axes_breaks_it():
    params, _ = by_optax(0, adalomo(LR, layer_axes=0, matrix_axes=None))
    assert_apart({name: x["kernel"] for name, x in params["self_attention"].items()}, layers_as_matrices())


def test_a_stack_without_layer_axes_has_factors_for_each_layer():
    state: Any = adalomo(LR).init(stack(0, 0))
    assert state[0].v_row["self_attention"]["query"]["kernel"].shape == (LAYERS, 12)
    assert state[0].v_col["self_attention"]["query"]["kernel"].shape == (LAYERS, 3, 4)


MODEL_LAYOUTS = {"query": DNH, "key": DNH, "value": DNH, "out": NHD}
TOKENS = jnp.asarray(gaussian((2, 5, 12), 3))


class Model(nnx.Module):
    def __init__(self):
        self.attn = nnx.MultiHeadAttention(3, 12, 12, use_bias=False, decode=False, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.attn(x)


def nnx_loss(model: Any, x: jax.Array) -> jax.Array:
    return jnp.mean((model(x) - jnp.sin(x)) ** 2)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.MultiHeadDotProductAttention(3, use_bias=False)(x)


def linen_loss(params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean((LinenModel().apply({"params": params}, x) - jnp.sin(x)) ** 2)  # pyright: ignore


def linen_params() -> Any:
    return LinenModel().init(jax.random.key(0), TOKENS)["params"]


def kernels_of(params: Any) -> dict[str, np.ndarray]:
    """The attention kernels of either model, by name."""
    return {path.split("/")[1]: np.asarray(x) for path, x in by_path(params).items()}


@functools.cache
def trained_as_matrices(is_nnx: bool) -> dict[str, np.ndarray]:
    """The kernels after three steps of adalomo on matrices, with the gradients that the model has."""
    if is_nnx:
        graphdef, params = nnx.split(Model(), nnx.Param)
        loss_fn = lambda params: nnx_loss(nnx.merge(graphdef, params), TOKENS)
    else:
        params, loss_fn = linen_params(), lambda params: linen_loss(params, TOKENS)
    as_matrices = lambda tree: {name: MODEL_LAYOUTS[name].matrix(x) for name, x in kernels_of(tree).items()}
    grad, tx = jax.jit(jax.grad(loss_fn)), adalomo(LR)
    found: Any = as_matrices(params)
    update, state = jax.jit(tx.update), tx.init(found)
    for _ in range(3):
        updates, state = update(as_matrices(grad(params)), state, found)
        found = optax.apply_updates(found, updates)
        leaves = [
            jnp.reshape(x, k.shape) for x, k in zip((found[n] for n in kernels_of(params)), jax.tree.leaves(params))
        ]
        params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    return kernels_of(params)


def by_nnx_optimizer() -> tuple[Any, Any]:
    model = Model()
    optimizer = nnx.Optimizer(model, adalomo(LR), wrt=nnx.Param)
    step = nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.grad(nnx_loss)(model, TOKENS)))
    for _ in range(3):
        step(model, optimizer)
    return nnx.state(model, nnx.Param), nnx.as_pure(nnx.state(optimizer)["opt_state"])


def by_fused_optimizer() -> tuple[Any, Any]:
    model = Model()
    optimizer = FusedOptimizer(model, adalomo(LR), nnx_loss, TOKENS)
    for _ in range(3):
        optimizer.step(model, TOKENS)
    return nnx.state(model, nnx.Param), nnx.as_pure(optimizer.opt_state).inner


def by_linen() -> tuple[Any, Any]:
    state = train_state.TrainState.create(apply_fn=linen_loss, params=linen_params(), tx=adalomo(LR))
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(linen_loss)(state.params, TOKENS)))
    for _ in range(3):
        state = step(state)
    return state.params, state.opt_state


def by_our_train_state() -> tuple[Any, Any]:
    state = TrainState.create(TOKENS, loss_fn=linen_loss, params=linen_params(), tx=adalomo(LR))
    for _ in range(3):
        state, _ = state.step(TOKENS)
    return state.params, state.opt_state.inner


@pytest.mark.parametrize("train", [by_nnx_optimizer, by_fused_optimizer, by_linen, by_our_train_state])
def test_flaxs_attention_is_known_in_every_loop(train: Callable[[], tuple[Any, Any]]):
    params, state = train()
    assert_close(kernels_of(params), trained_as_matrices(train in (by_nnx_optimizer, by_fused_optimizer)))
    floats = [x.size for x in jax.tree.leaves(state) if x.dtype == jnp.float32]
    assert sum(floats) == 4 * (12 + 12 + 1)


def test_factors_are_spread_as_the_axes_that_they_have():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    arrays = nested({"attn/query/kernel": gaussian((16, 4, 4), 0), "attn/out/kernel": gaussian((4, 4, 16), 1)})
    specs = nested({"attn/query/kernel": ("x", "y"), "attn/out/kernel": ("y", None, "x")})
    placed = lambda x, spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    params = jax.tree.map(placed, arrays, specs)
    kernel = lambda p, name: p["attn"][name]["kernel"]
    loss_fn = lambda p: jnp.mean(jnp.einsum("dnh,nhd->d", kernel(p, "query"), kernel(p, "out")) ** 2)
    step = fuse(loss_fn, adalomo(LR))
    state, on_one = step.init(params), jax.tree.map(jnp.asarray, arrays)
    found, expected = step.jit(params, state), step.jit(on_one, step.init(on_one))
    assert_close(found.params, expected.params)
    rule = cast(Any, found.state).inner[0]
    for name, row, col in (("query", ("x",), ("y", None)), ("out", ("y", None), ("x",))):
        for of_side, spec in ((rule.v_row, row), (rule.v_col, col)):
            x = of_side["attn"][name]["kernel"]
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), x.ndim)
