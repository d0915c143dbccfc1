"""These tests measure what a step saves and computes for stacked layers of Python lists."""

import flops
import jax
import jax.numpy as jnp
import optax
import pytest
from comparison import relative_error
from list_training import by_fuse, by_optax
from lists_of_layers import DIM, MODELS, apply, data, error, fuse_lists, loop, matrix, model

from adalomo_jax import adalomo, fuse


def test_what_repeats_around_larger_parameters_stays():
    """Two scans over one stack each precede a matrix. One scan would carry the sums of the stack's gradients."""

    def loss(params, x, key):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(normalize(x) @ w), None))
        for name in ("between", "head"):
            x = normalize(jax.lax.scan(layer, x, params["layers"])[0]) @ params[name]
        return error(x)

    normalize = lambda x: x / (1 + jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True)))
    matrices = {name: matrix(i, 8 * DIM, 8 * DIM) for i, name in enumerate(("between", "head"))}
    params = {"layers": jnp.stack([matrix(3 + i, 8 * DIM, 8 * DIM) for i in range(4)]), **matrices}
    x = jnp.ones((2, 8 * DIM))
    placed = fuse_lists(loss, adalomo(1e-2)).place(params, x, None)
    assert jax.tree.structure(placed) == jax.tree.structure(params)


def test_a_layer_without_remat_saves_no_more_than_its_products_and_its_input():
    """A scan would save all values that a gelu's derivative reads; in unrolled layers XLA recomputes them."""
    found = model(4, loop(lambda i: jax.nn.gelu), {})
    step = fuse_lists(found.loss_fn, adalomo(1e-2))
    placed = step.place(found.params, *data(0))
    rows = data(0)[0].size // DIM
    of_rows = 2 * 4  # the mean and the root of a norm
    assert step.saved_bytes(placed, *data(0)) <= 4 * rows * (4 * (DIM + 2 * DIM) + of_rows) + 1000
    calls = [(tree, step.abstract_state(tree, *data(0)), *data(0)) for tree in (placed, found.params)]
    assert flops.count(step, *calls[0]) == flops.count(step.unfused, *calls[1]) > 0


def test_what_layers_make_of_a_shared_matrix_is_not_saved():
    """The step makes it again. Otherwise each layer would save its transpose, say."""
    with_shared, found = MODELS["shared"](), MODELS["plain, remat None"]()
    steps = [fuse_lists(each.loss_fn, adalomo(1e-2)) for each in (with_shared, found)]
    calls = [(step.place(each.params, *data(0)), *data(0)) for step, each in zip(steps, (with_shared, found))]
    saved, without = (step.saved_bytes(*call) for step, call in zip(steps, calls))
    products = 4 * data(0)[0].nbytes
    assert saved - without == products


@pytest.mark.slow
@pytest.mark.parametrize("read_twice", [False, True])
def test_weights_that_are_cast_before_a_checkpoint_are_not_saved(read_twice):
    """A checkpoint saves its inputs. The step casts again, and computes the layer no more often than without stacks."""

    def loss(params, x, key):
        params, x = jax.tree.map(lambda w: w.astype(jnp.bfloat16), (params, x))
        x = x @ params["into"]
        for p in params["layers"]:
            x = jax.checkpoint(apply)(p, x)
            x = jnp.tanh(x @ p["up"] @ p["down"]) if read_twice else x
        return error(x @ params["head"])

    params = model(4, loss, {}).params
    step = fuse_lists(loss, adalomo(1e-2))
    placed, rows = step.place(params, *data(0)), data(0)[0].size // DIM
    calls = [(tree, step.abstract_state(tree, *data(0)), *data(0)) for tree in (placed, params)]
    assert flops.count(step, *calls[0]) == flops.count(step.unfused, *calls[1]) > 0
    saved_rows = 2 * 4 * rows * (DIM + (2 * DIM + 2 * DIM if read_twice else 0))
    assert step.saved_bytes(placed, *data(0)) <= saved_rows + 1000
    assert relative_error(by_fuse(step, params)[0], by_optax(loss, adalomo(1e-2), params)) < 0.02


def test_the_step_does_not_grow_with_the_layers():
    """Its compile time does not grow, either."""

    def equations(layers, roll):
        found = model(layers, loop(lambda i: jax.nn.gelu), {})
        step = fuse(found.loss_fn, optax.sgd(1e-2), roll=roll)
        params = step.place(found.params, *data(0))
        return step.jit.lower(params, step.abstract_state(params, *data(0)), *data(0)).as_text().count("\n")

    assert equations(6, True) == equations(12, True) < equations(12, False) / 2
