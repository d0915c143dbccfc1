"""With stacks and saved activations in host memory, a step keeps its numbers, and each array is where it should be.

The CPU backend has the memory kinds. Only an accelerator's compiler can say what they save: test_tpu_offload.py.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import copied
from compiled import copies_of_stacks, memory_of, tree_bytes
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from language_model import batch, init_params, make_loss
from tiers import slow

from adalomo_jax import StepResult, adalomo, fuse, lomo

BATCHES = [batch(seed, batch_size=4) for seed in range(3)]
MATRICES = ["layers0/down", "layers0/mix", "layers0/up"]
BOTH = ("params", "activations")
OPTIONS = {
    "adalomo": {},
    "lomo": {"tx": lomo(1e-2)},
    "adamw": {"tx": optax.adamw(1e-3)},
    "clipped microbatches": {"max_grad_norm": 0.1, "microbatches": 2},
    "frozen": {"trainable": lambda path: "up" in path or "embed" in path},
    "bfloat16 microbatches": {"dtype": jnp.bfloat16, "microbatches": 2},
    "no remat": {"remat": "no remat"},
}
CASES = [(BOTH, "adalomo")]
CASES += [slow(offload, case) for offload in ("params", "activations") for case in ("adalomo", "bfloat16 microbatches")]
CASES += [slow(BOTH, case) for case in OPTIONS if case != "adalomo"]


def run(offload, *, dtype=jnp.float32, remat="remat", tx=None, spread=lambda params: params, **options):
    """The result of the last step, and the parameters before the first."""
    step = fuse(make_loss(remat), tx or adalomo(1e-2), offload=offload, **options)
    params = init_params(3, dtype=dtype)
    before = jax.tree.map(np.asarray, params)
    params = step.place(spread(params), BATCHES[0])
    state, result = step.init(params, BATCHES[0]), cast(StepResult, None)
    for tokens in BATCHES:
        result = step.jit(params, state, tokens)
        params, state = result.params, result.state
    return result, before


def paths_on_host(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, x in leaves
        if x.sharding.memory_kind == "pinned_host"
    ]


@functools.cache
def plain(case):
    return run(None, **OPTIONS[case])


def assert_equal(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        rtol = 0 if a.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("offload", "case"), CASES, ids=str)
def test_equals_the_step_without(offload, case):
    (result, _), (expected, before) = run(offload, **OPTIONS[case]), plain(case)
    assert_equal(result, expected)
    assert paths_on_host(result.params) == (MATRICES if "params" in offload else [])
    with pytest.raises(AssertionError):  # the parameters moved, and the comparison sees it
        assert_equal(result.params, before)


@pytest.mark.slow
def test_equals_the_unfused_step_from_the_same_memory():
    step = fuse(make_loss(), adalomo(1e-2), offload=BOTH)
    params = step.place(init_params(3), BATCHES[0])
    state = step.init(params, BATCHES[0])
    unfused = jax.jit(step.unfused)(params, state, BATCHES[0])
    assert paths_on_host(unfused.params) == MATRICES
    assert_equal(step.jit(params, state, BATCHES[0]), unfused)


@pytest.mark.uncached
def test_is_updated_in_place():
    step = fuse(make_loss(), adalomo(1e-2), offload="params")
    params = step.place(init_params(3, dim=64, hidden=128), BATCHES[0])
    state = step.init(params, BATCHES[0])
    compiled = step.jit.lower(params, state, BATCHES[0]).compile()
    sizes = memory_of(compiled)
    # The CPU's compiler counts both memories as one.
    assert sizes.alias_size_in_bytes + sizes.host_alias_size_in_bytes >= tree_bytes((params, state))
    matrices = {name: x for name, x in params["layers0"].items() if x.ndim == 3}
    assert len(matrices) == 3 and copies_of_stacks(compiled, matrices) == []


@pytest.mark.parametrize("microbatches", [slow(None), 2])
def test_saved_layer_inputs_are_on_the_host(microbatches):
    saved = {}
    for offload in (None, "activations"):
        step = fuse(make_loss(), adalomo(1e-2), offload=offload, microbatches=microbatches)
        params = init_params(3)
        program = str(jax.make_jaxpr(step)(params, step.init(params, BATCHES[0]), BATCHES[0]))
        saved[offload] = "f32<host>[3,4,8,16]" in program or "f32<host>[3,2,2,8,16]" in program
    assert saved == {None: False, "activations": True}


@pytest.mark.slow
def test_shapes_are_described():
    step = fuse(make_loss(), adalomo(1e-2), offload="params")
    params = init_params(3)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    placed = step.place(shapes, BATCHES[0])
    assert paths_on_host(placed) == MATRICES
    state = step.init(placed, BATCHES[0])
    compiled = step.jit.lower(placed, state, BATCHES[0]).compile()
    result = compiled(step.place(params, BATCHES[0]), state, BATCHES[0])
    assert paths_on_host(result.params) == MATRICES


def test_place_moves_back_what_belongs_on_the_device():
    params = init_params(3)
    placed = fuse(make_loss(), adalomo(1e-2), offload="params").place(params, BATCHES[0])
    assert placed["embed"] is params["embed"]
    back = fuse(make_loss(), adalomo(1e-2)).place(placed, BATCHES[0])
    assert paths_on_host(placed) == MATRICES and paths_on_host(back) == []
    assert_equal(back, params)


@pytest.mark.slow
def test_stacks_stay_spread_over_devices():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    spread = lambda params: jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "x"))), params
    )
    result, _ = run("params", spread=spread)
    stack = result.params["layers0"]["up"]
    assert paths_on_host(result.params) == MATRICES and len(stack.sharding.device_set) == 4
    assert stack.addressable_shards[0].data.shape == (3, 16, 6)
    expected, _ = plain("adalomo")
    np.testing.assert_allclose(stack, expected.params["layers0"]["up"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("offload", "params_of"), [("params", None), (None, "params")])
def test_refuses_parameters_in_another_memory(offload, params_of):
    step = fuse(make_loss(), adalomo(1e-2), offload=offload)
    params = fuse(make_loss(), adalomo(1e-2), offload=params_of).place(init_params(3), BATCHES[0])
    state = step.init(params, BATCHES[0])
    for call in (step, step.jit):
        with pytest.raises(ValueError, match="'layers0/down' must be in .* memory.*step.place"):
            call(params, state, BATCHES[0])


def test_place_refuses_a_backend_without_such_memory(monkeypatch):
    monkeypatch.setattr("adalomo_jax.fused.offload.HOST", "no such memory")
    step = fuse(make_loss(), adalomo(1e-2), offload="params")
    with pytest.raises(ValueError, match="memory kind 'no such memory' .* and there is none. Leave offload"):
        step.place(init_params(3), BATCHES[0])


def on_axis_1(params, x):
    """Stacks on axis 1, with layers of one and of two matrices: only a layer of two consists of whole matrices."""
    one, two = (jnp.moveaxis(params[name], 1, 0) for name in ("one", "two"))
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w[0] + x @ w[1][0] - x @ w[1][1]), None))
    return jnp.mean(jax.lax.scan(layer, x, (one, two))[0])


@pytest.mark.slow
def test_layers_on_axis_1():
    normal = lambda *shape: jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    params, x, results = {"one": normal(8, 3, 8), "two": normal(2, 3, 8, 8)}, jnp.ones((4, 8)), []
    for offload in (None, BOTH):
        step = fuse(on_axis_1, adalomo(1e-2), offload=offload)
        placed = step.place(copied(params), x)
        assert paths_on_host(placed) == (["two"] if offload else [])
        results.append(step.jit(placed, step.init(placed, x), x))
    assert_equal(*results)
    assert paths_on_host(results[1].params) == ["two"]


def test_refuses_a_model_with_nothing_to_offload():
    step = fuse(lambda params, x: jnp.mean(x @ params), adalomo(1e-2), offload="params")
    params, x = jnp.ones((8, 8)), jnp.ones((4, 8))
    with pytest.raises(ValueError, match="no scan runs over one.*Leave 'params' out"):
        step.place(params, x)
    with pytest.raises(ValueError, match="no scan runs over one.*Leave 'params' out"):
        step(params, step.init(params, x), x)


@pytest.mark.parametrize("offload", ["weights", ("params", "state")])
def test_refuses_what_cannot_be_offloaded(offload):
    with pytest.raises(ValueError, match="must be 'params', 'activations', or a tuple of both, got "):
        fuse(make_loss(), adalomo(1e-2), offload=offload)
