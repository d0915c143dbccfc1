"""Kernels with an axis for heads are updated as the matrices that they are: against the same rule on these matrices."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiers import slow
from tolerances import assert_apart, assert_close

from adalomo_jax import MatrixAxes, adalomo, attention_axes, fuse, per_layer, scale_by_adalomo
from adalomo_jax.linen import TrainState
from adalomo_jax.models import PRESETS, Llama
from adalomo_jax.nnx import FusedOptimizer

LR = 0.1
SIZES = {"D": 12, "N": 3, "H": 4, "K": 2, "2": 2, "3": 3}


class Layout(NamedTuple):
    """The letters of a kernel's axes, and those of its matrix: D the width, N and K heads, H the width of a head."""

    kernel: str
    batch: str
    rows: str
    columns: str

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        return tuple(sizes[letter] for letter in self.kernel)

    def matrix(self, x: Any) -> np.ndarray:
        order = [self.kernel.index(letter) for letter in self.batch + self.rows + self.columns]
        x, sizes = np.asarray(x).transpose(order), dict(zip(self.kernel, np.shape(x)))
        product = lambda letters: math.prod(sizes[letter] for letter in letters)
        return x.reshape(*(sizes[b] for b in self.batch), product(self.rows), product(self.columns))

    def factor(self, x: Any, name: str) -> np.ndarray:
        """``v_row`` or ``v_col`` of the matrix."""
        side, other = (self.rows, self.columns) if name == "v_row" else (self.columns, self.rows)
        kept = [letter for letter in self.kernel if letter not in other]
        x = np.transpose(x, [kept.index(letter) for letter in self.batch + side])
        return x.reshape(*x.shape[: len(self.batch)], -1)


DNH, NHD = Layout("DNH", "", "D", "NH"), Layout("NHD", "", "NH", "D")
LAYOUTS = {
    "layers_0/attention/query/kernel": DNH,
    "layers_0/attention/key/kernel": Layout("DKH", "", "D", "KH"),
    "layers_0/attention/value/kernel": Layout("DKH", "", "D", "KH"),
    "layers_0/attention/out/kernel": NHD,
    "layers/0/attn/q_proj/w": DNH,
    "layers/0/attn/k_proj/w": Layout("DKH", "", "D", "KH"),
    "layers/0/attn/v_proj/w": Layout("DKH", "", "D", "KH"),
    "layers/0/attn/o_proj/w": NHD,
    "layer_0/attn/q_einsum/w": Layout("NDH", "", "D", "NH"),
    "layer_0/attn/k_einsum/w": Layout("KDH", "", "D", "KH"),
    "layer_0/attn/kv_einsum/w": Layout("2KDH", "2", "D", "KH"),
    "layer_0/attn/qkv_einsum/w": Layout("3NDH", "3", "D", "NH"),
    "layer_0/attn/attn_vec_einsum/w": NHD,
    "decoder/self_attention/qkv_proj/kernel": Layout("D3NH", "3", "D", "NH"),
}
OTHERS = {
    "a dense layer": ("attention/query/kernel", (12, 12)),
    "a bias": ("attention/query/bias", (3, 4)),
    "a stack of dense layers": ("layers/attention/query/kernel", (6, 12, 12)),
    "a stack of narrow dense layers": ("layers/attention/value/kernel", (32, 64, 16)),
    "a stack of dense layers on axis 1": ("layers/attention/value/kernel", (12, 6, 12)),
    "a stack of dense layers out": ("layers/attention/out/kernel", (6, 12, 12)),
    "a stack of dense layers from narrow heads": ("layers/attention/out/kernel", (62, 40, 54)),
    "a stack of kernels on axis 1": ("layers/self_attention/query/kernel", (512, 4, 8, 64)),
    "keys and values as matrices": ("attn/kv_einsum/w", (2, 12, 8)),
    "an MLP's stack": ("layers/mlp/out/kernel", (2, 8, 12)),
    "a convolution": ("decoder/out/kernel", (3, 3, 8, 16)),
    "a convolution of attention": ("attention/key/kernel", (1, 1, 16, 4)),
    "experts": ("moe/w", (8, 16, 64)),
    "Gemma's gates": ("mlp/gating_einsum/w", (2, 64, 16)),
}
EVERYWHERE = {
    "query/kernel": DNH,
    "params/out/kernel": NHD,
    "params/MultiHeadDotProductAttention_0/out/kernel": NHD,
    "blocks/3/mha/out/kernel/value": NHD,
    "value/kernel/value": DNH,
}
"""Other places of the names: a model that is attention only, Linen's own names, ``nnx.State``."""


def gaussian(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """With rows of different sizes, so that row statistics matter."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-3, 3, shape[:-1] + (1,))).astype(np.float32)


def nested(by_path: dict[str, Any]) -> Any:
    tree: Any = {}
    for path, x in by_path.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = x
    return tree


def by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def kernels(seed: int, sizes: dict[str, int] = SIZES) -> dict[str, np.ndarray]:
    return {path: gaussian(layout.shape(sizes), seed + k) for k, (path, layout) in enumerate(LAYOUTS.items())}


def matrices(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    return {path: LAYOUTS[path].matrix(x) for path, x in tensors.items()}


def run(tx: optax.GradientTransformation, params: Any, grads: list[Any]) -> tuple[list[Any], Any]:
    """The parameters after each step, and the last state."""
    update, trajectory = jax.jit(tx.update), []
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


@functools.cache
def on_kernels(**options: Any) -> tuple[list[dict[str, Any]], Any]:
    tx = adalomo(LR, weight_decay=0.5, **options)
    trajectory, state = run(tx, nested(kernels(0)), [nested(kernels(100 * t)) for t in range(1, 6)])
    return [matrices(by_path(params)) for params in trajectory], state


def test_equals_the_rule_on_the_matrices():
    """Update normalization and weight decay are of the whole tensor, where it is several matrices, too."""
    trajectory, state = on_kernels()
    expected, of_matrices = run(
        adalomo(LR, weight_decay=0.5, matrix_axes=None),
        matrices(kernels(0)),
        [matrices(kernels(100 * t)) for t in range(1, 6)],
    )
    assert_close(trajectory, expected)
    for name in ("v_row", "v_col"):
        ours, theirs = by_path(getattr(state[0], name)), getattr(cast(Any, of_matrices)[0], name)
        for path, x in ours.items():
            letters = [
                k
                for k in LAYOUTS[path].kernel
                if k not in getattr(LAYOUTS[path], {"v_row": "columns"}.get(name, "rows"))
            ]
            order = sorted(range(len(letters)), key=lambda i: letters[i] not in LAYOUTS[path].batch)
            assert_close(np.transpose(x, order).reshape(theirs[path].shape), theirs[path])


def test_equals_the_papers_equations_on_the_matrices():
    theta, moments = matrices(kernels(0)), {path: reference.init(x) for path, x in matrices(kernels(0)).items()}
    for t, found in enumerate(on_kernels()[0], 1):
        g = matrices(kernels(100 * t))
        rule = reference.Adalomo(weight_decay=0.5)
        stepped = {path: reference.adalomo_step(theta[path], g[path], moments[path], t, LR, rule) for path in theta}
        theta, moments = {path: x for path, (x, _) in stepped.items()}, {path: m for path, (_, m) in stepped.items()}
        assert_close(found, theta)


def test_it_is_another_rule_over_the_last_two_axes():
    first, last_two = on_kernels()[0][0], on_kernels(matrix_axes=None)[0][0]
    for path in LAYOUTS:
        assert_apart(last_two[path], first[path])


def factored_bytes(tx: optax.GradientTransformation, path: str, shape: tuple[int, ...]) -> int:
    rule = cast(Any, jax.eval_shape(tx.init, nested({path: jax.ShapeDtypeStruct(shape, jnp.bfloat16)})))[0]
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((rule.v_row, rule.v_col, rule.v)))


@pytest.mark.parametrize("path", LAYOUTS)
def test_the_state_is_as_small_as_of_the_matrix(path: str):
    """With the sizes of a LLaMA-7B's attention."""
    shape = LAYOUTS[path].shape({"D": 4096, "N": 32, "K": 8, "H": 128, "2": 2, "3": 3})
    *batch, m, n = LAYOUTS[path].matrix(np.broadcast_to(np.float32(0), shape)).shape
    assert factored_bytes(adalomo(LR), path, shape) == 4 * (math.prod(batch) * (m + n) + 1)
    kept = factored_bytes(adalomo(LR, matrix_axes=None), path, shape)
    assert kept == 4 * (math.prod(shape) // shape[-1] + math.prod(shape) // shape[-2] + 1)


@pytest.mark.parametrize("path, shape", OTHERS.values(), ids=list(OTHERS))
def test_what_is_not_attention_is_factored_over_its_last_two_axes(path: str, shape: tuple[int, ...]):
    assert attention_axes(path, shape) is None
    params = nested({path: jax.ShapeDtypeStruct(shape, jnp.float32)})
    assert jax.eval_shape(adalomo(LR).init, params) == jax.eval_shape(adalomo(LR, matrix_axes=None).init, params)


@pytest.mark.parametrize("path", EVERYWHERE)
def test_attention_is_known_wherever_it_is(path: str):
    layout = EVERYWHERE[path]
    assert attention_axes(path, layout.shape(SIZES)) == attention_axes("attn/" + path, layout.shape(SIZES)) is not None
    stacked: Any = attention_axes("layers/attn/" + path, (5, *layout.shape(SIZES)))
    assert stacked == attention_axes(path, layout.shape(SIZES))


def test_our_own_llama_is_of_matrices():
    params = nnx.state(nnx.eval_shape(lambda: Llama(PRESETS["tiny"], rngs=nnx.Rngs(0), dtype=jnp.float32)), nnx.Param)
    shapes = {path: x.shape for path, x in by_path(params).items()}
    assert "layers/self_attn/q_proj/kernel/value" in shapes
    for path, shape in shapes.items():
        assert attention_axes(path, shape) is None and attention_axes(path, shape[1:]) is None


QUERY, OUT = MatrixAxes(0, (1, 2)), MatrixAxes(rows=(0, 1), columns=2)
PARAMS = {"attn": {"q": np.ones((12, 3, 4), np.float32), "o": np.ones((3, 4, 12), np.float32)}, "norm": np.ones(12)}
BY_NAME = lambda path, shape: {"attn/q": QUERY, "attn/o": OUT}.get(path)
OPTIONS: dict[str, Any] = {
    "a tree": {"attn": {"q": QUERY, "o": OUT}, "norm": None},
    "a tree of Optax's": {
        "attn": {
            "q": optax.contrib.MuonDimensionNumbers(0, (1, 2)),
            "o": optax.contrib.MuonDimensionNumbers((0, 1), 2),
        },
        "norm": None,
    },
    "negative axes": {"attn": {"q": MatrixAxes([-3], [-2, -1]), "o": MatrixAxes((-3, -2), -1)}, "norm": None},
    "a function": BY_NAME,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_axes_are_a_tree_or_a_function(option: str):
    for tx in (adalomo(LR, matrix_axes=OPTIONS[option]), scale_by_adalomo(matrix_axes=OPTIONS[option])):
        state: Any = tx.init(PARAMS)
        rule = state if hasattr(state, "v_row") else state[0]
        shapes = jax.tree.map(jnp.shape, (rule.v_row, rule.v_col, rule.v))
        assert shapes == (
            {"attn": {"q": (12,), "o": (3, 4)}, "norm": (1,)},
            {"attn": {"q": (3, 4), "o": (12,)}, "norm": (1,)},
            {"attn": {"q": (1,), "o": (1,)}, "norm": (12,)},
        )


def test_a_prefix_is_of_all_below_it():
    state: Any = adalomo(LR, matrix_axes={"attn": QUERY, "norm": None}).init(PARAMS)
    assert jax.tree.map(jnp.shape, state[0].v_col["attn"]) == {"q": (3, 4), "o": (4, 12)}


def test_rows_may_be_last():
    """The other way round it is the same rule: what is divided by is a product of both."""
    tensors = [{"w": gaussian((3, 4, 12), seed)} for seed in range(4)]
    there, back = (
        run(adalomo(LR, matrix_axes=axes), tensors[0], tensors[1:])[0]
        for axes in (MatrixAxes((0, 1), 2), MatrixAxes(2, (0, 1)))
    )
    assert_close(back, there)


def test_axes_that_are_left_over_are_batch_axes_wherever_they_are():
    layout = Layout("D3NH", "3", "H", "DN")
    tensors = [gaussian((5, 3, 2, 4), seed) for seed in range(4)]
    found, _ = run(adalomo(LR, matrix_axes=MatrixAxes(3, (0, 2))), tensors[0], tensors[1:])
    expected, _ = run(adalomo(LR), layout.matrix(tensors[0]), [layout.matrix(g) for g in tensors[1:]])
    assert_close([layout.matrix(x) for x in found], expected)


@pytest.mark.parametrize("dtype", ["bfloat16", slow("complex64")])
def test_other_types_are_matrices_too(dtype: str):
    tensors = [jnp.asarray(gaussian((12, 3, 4), seed), dtype) * (1j if "c" in dtype else 1) for seed in (0, 1)]
    found, _ = run(adalomo(LR, matrix_axes=QUERY), tensors[0], tensors[1:])
    expected, _ = run(adalomo(LR), tensors[0].reshape(12, 12), [tensors[1].reshape(12, 12)])
    as_real = lambda x: np.asarray(jnp.abs(x), np.float64)
    assert_close([as_real(x).reshape(12, 12) for x in found], [as_real(x) for x in expected])


def test_hyperparameters_may_be_injected():
    params = nested({"attn/query/kernel": gaussian((12, 3, 4), 0)})
    state: Any = optax.inject_hyperparams(adalomo)(learning_rate=0.1).init(params)
    assert state.inner_state[0].v_row["attn"]["query"]["kernel"].shape == (12,)
    tx = optax.inject_hyperparams(adalomo, static_args=("matrix_axes",))(learning_rate=0.1, matrix_axes=lambda *_: None)
    assert cast(Any, tx.init(params)).inner_state[0].v_row["attn"]["query"]["kernel"].shape == (12, 3)


LAYERS = 3


def stack(seed: int, axis: int) -> Any:
    """Of attention's kernels as MaxText has them, with an axis for layers."""
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
    """Of a stack of rank 4 the axes are those of a layer, of rank 3."""
    params, state = WAYS[way](axis)
    found = {name: np.moveaxis(x["kernel"], axis, 0) for name, x in params["self_attention"].items()}
    assert_close(found, layers_as_matrices())
    shapes = {path: x.shape for path, x in by_path((state[0].v_row, state[0].v_col)).items()}
    assert shapes == {
        "0/self_attention/query/kernel": (LAYERS, 12), "0/self_attention/out/kernel": (LAYERS, 3, 4),
        "1/self_attention/query/kernel": (LAYERS, 3, 4), "1/self_attention/out/kernel": (LAYERS, 12),
    }  # fmt: skip


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
    """Of the attention of one of the two models, by their names."""
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


BAD: list[tuple[Any, str]] = [
    (
        3,
        r"matrix_axes must be MatrixAxes\(rows, columns\), or None for the last two axes, got 3\. .*function of path",
    ),
    ("attn", r"matrix_axes must be MatrixAxes\(rows, columns\), or None .*, got 'attn'"),
    (True, r"matrix_axes must be MatrixAxes\(rows, columns\), or None .*, got True"),
    ({"attn": (0, (1, 2))}, r"matrix_axes\['attn'\]\[0\] must be MatrixAxes\(rows, columns\), or None .*, got 0"),
]
BAD_OF_LEAVES: list[tuple[Any, str]] = [
    ({"attn": MatrixAxes(0, 3), "norm": None}, r"'attn/o' must be axes of its shape \(3, 4, 12\), .*columns=3\)"),
    ({"attn": MatrixAxes(0, (0, 1)), "norm": None}, r"'attn/o' must be axes of .* none twice, got MatrixAxes\(rows=0,"),
    ({"attn": MatrixAxes(0, (1, -2)), "norm": None}, r"'attn/o' must be axes .* none twice, .*\(1, -2\)\)\. None is"),
    ({"attn": MatrixAxes(0, ()), "norm": None}, r"'attn/o' must be axes .* at least one .*columns=\(\)\)"),
    ({"attn": MatrixAxes(0, cast(Any, "1")), "norm": None}, r"'attn/o' must be axes .*columns='1'\)"),
    ({"attn": MatrixAxes(False, 1), "norm": None}, r"'attn/o' must be axes .*rows=False"),
    (
        {"attn": None, "norm": MatrixAxes(0, 0)},
        r"'norm' must be None, for a shape \(12,\) is no matrix's, got",
    ),
    ({"attn": None}, r"matrix_axes has no entry for \['norm'\]; give it its MatrixAxes, or None"),
    ({"attn": None, "norm": None, "x": None}, r"matrix_axes\['x'\] is of no parameter"),
    (lambda path, shape: (0, 1), r"What matrix_axes returns of 'attn/o' \(3, 4, 12\) must be MatrixAxes.*got \(0, 1\)"),
    (lambda path, shape: MatrixAxes(0, 5), r"matrix_axes of 'attn/o' must be axes of its shape"),
]


@pytest.mark.parametrize("axes, message", BAD)
def test_what_is_no_option_is_refused_where_it_is_given(axes: Any, message: str):
    for make in (functools.partial(adalomo, LR), scale_by_adalomo):
        with pytest.raises(ValueError, match=message) as error:
            make(matrix_axes=axes)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("axes, message", BAD_OF_LEAVES)
def test_what_is_no_axis_of_a_leaf_is_refused(axes: Any, message: str):
    tx = adalomo(LR, matrix_axes=axes)
    for ask in (lambda: tx.init(PARAMS), lambda: tx.update(PARAMS, adalomo(LR).init(PARAMS), PARAMS)):
        with pytest.raises(ValueError, match=message) as error:
            ask()
        assert "\n" not in str(error.value)


def test_a_state_of_other_axes_is_refused():
    params = nested({"attn/query/kernel": jnp.ones((12, 3, 4))})
    older = adalomo(LR, matrix_axes=None)
    message = r"v_row of 'attn/query/kernel' has the shape \(12, 3\), but \(12,\) is due.*None"
    with pytest.raises(ValueError, match=message):
        adalomo(LR).update(params, older.init(params), params)
    loss_fn = lambda params: jnp.sum(params["attn"]["query"]["kernel"] ** 2)
    with pytest.raises(ValueError, match=r"v_row.*\(12, 3\), but \(12,\) is due.*matrix_axes=None to adalomo"):
        fuse(loss_fn, adalomo(LR)).jit(params, fuse(loss_fn, older).init(params))
    fuse(loss_fn, older).jit(params, fuse(loss_fn, older).init(params))
