"""Updates of kernels with an axis for heads equal the same rule on the matrices that the kernels stand for."""

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from attention_kernels import DNH, LR, NHD, OUT, QUERY, Layout, by_path, gaussian, nested
from flax import nnx
from tiers import slow
from tolerances import assert_apart, assert_close

from adalomo_jax import MatrixAxes, adalomo, attention_axes, fuse, scale_by_adalomo
from adalomo_jax.models import PRESETS, Decoder

SIZES = {"D": 12, "N": 3, "H": 4, "K": 2, "2": 2, "3": 3}
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
"""Other places for the names: a model that is attention only, Linen's own names, ``nnx.State``."""


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
    """Update normalization and weight decay apply to the whole tensor, even if it is several matrices."""
    trajectory, state = on_kernels()
    expected, of_matrices = run(
        adalomo(LR, weight_decay=0.5, matrix_axes=None),
        matrices(kernels(0)),
        [matrices(kernels(100 * t)) for t in range(1, 6)],
    )
    assert_close(trajectory, expected)
    for name in ("v_row", "v_col"):
        assert jax.tree.structure(getattr(state[0], name)) == jax.tree.structure(nested(dict.fromkeys(LAYOUTS, 0)))
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
    """The sizes are those of a LLaMA-7B's attention."""
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
    params = nnx.state(nnx.eval_shape(lambda: Decoder(PRESETS["tiny"], rngs=nnx.Rngs(0), dtype=jnp.float32)), nnx.Param)
    shapes = {path: x.shape for path, x in by_path(params).items()}
    assert "layers/self_attn/q_proj/kernel/value" in shapes
    for path, shape in shapes.items():
        assert attention_axes(path, shape) is None and attention_axes(path, shape[1:]) is None


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
    """Rows and columns can swap places without changing the rule: the divisor is a product of both."""
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
        r"'norm' must be None: its shape \(12,\) is no matrix's, got",
    ),
    ({"attn": None}, r"matrix_axes has no entry for \['norm'\]; give it its MatrixAxes, or None"),
    ({"attn": None, "norm": None, "x": None}, r"matrix_axes\['x'\] matches no parameter"),
    (
        lambda path, shape: (0, 1),
        r"The result of matrix_axes for 'attn/o' \(3, 4, 12\) must be MatrixAxes.*got \(0, 1\)",
    ),
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
