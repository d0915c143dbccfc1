"""The step pulls back each checkpoint of a scan's body by itself, and updates at once the parameters that it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import copied, relative_error
from compiled import memory_of, tree_bytes
from lists_of_layers import MODELS, data, fuse_lists
from tiers import slow

from adalomo_jax import fuse
from adalomo_jax.fused.plan.plan import LayerScan

LAYERS, DIM, PARTS = 4, 64, 4
MATRIX = 4 * DIM * DIM
NAMES = [f"part{k}" for k in range(PARTS)]


def matrices(scale=0.3):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(scale * rng.normal(size=(LAYERS, DIM, DIM)) / 8, jnp.float32) for name in NAMES}


def part(x, w):
    return x + jnp.tanh(x @ w)


def loss_of(remat, read=lambda w, k: w[NAMES[k]]):
    """A loss with each part, the whole layer, or nothing under ``jax.checkpoint``."""
    one = jax.checkpoint(part) if remat == "parts" else part

    def layer(x, w):
        for k in range(PARTS):
            x = one(x, read(w, k))
        return x, None

    layer = jax.checkpoint(layer) if remat == "layer" else layer
    return lambda params, x: jnp.mean(jnp.square(jax.lax.scan(layer, x, params)[0] - 1))


X = jnp.asarray(np.random.default_rng(1).normal(size=(2, DIM)), jnp.float32)


@pytest.mark.parametrize("remat, alive", [("parts", 1), ("layer", PARTS), ("none", PARTS)])
def test_gradients_alive_at_once(remat, alive):
    plan = fuse(loss_of(remat), optax.adamw(1e-2)).plan(matrices(), X)
    assert plan.gradient_bytes == alive * MATRIX


def test_the_compiled_step_has_fewer_gradients_at_once():
    """Its temporaries are smaller, except for the saved inputs of the parts, of which there are more."""
    temporaries = {}
    for remat in ("parts", "layer"):
        step = fuse(loss_of(remat), optax.sgd(1e-2))
        args = (matrices(), step.init(matrices(), X), X)
        memory = memory_of(step.jit.lower(*args).compile())
        assert memory.alias_size_in_bytes >= tree_bytes(args[0])
        temporaries[remat] = memory.temp_size_in_bytes
    saved = LAYERS * (PARTS - 1) * X.nbytes
    assert temporaries["parts"] <= temporaries["layer"] + saved - 1.5 * MATRIX


def shared_by_parts(w, k):
    """The first and the last part read one matrix."""
    return w[NAMES[0 if k == PARTS - 1 else k]]


def of_two_matrices(w, k):
    """The second part reads a product, made outside of its checkpoint, of its own matrix and the third part's."""
    return w[NAMES[1]] @ w[NAMES[2]] if k == 1 else w[NAMES[k]]


@pytest.mark.parametrize("options", [{}, slow({"max_grad_norm": 0.1}), slow({"microbatches": 2, "batch_argnums": 1})])
@pytest.mark.parametrize("read", [shared_by_parts, of_two_matrices])
def test_equals_optax(read, options):
    loss, tx = loss_of("parts", read), optax.sgd(0.1, momentum=0.9)
    expected = params = matrices()
    of_optax = tx if "max_grad_norm" not in options else optax.chain(optax.clip_by_global_norm(0.1), tx)
    state = of_optax.init(expected)
    step = fuse(loss, tx, **options)
    params, fused = copied(params), step.init(params, X)
    for _ in range(3):
        gradients = jax.grad(loss)(expected, X)
        updates, state = of_optax.update(gradients, state, expected)
        expected = optax.apply_updates(expected, updates)
        params, fused, *_ = step.jit(params, fused, X)
    assert relative_error(params, expected) < 1e-5


def test_stacks_that_are_made_into_one_value_before_the_scan_are_updated_together():
    """Their gradients are complete only when the last part that reads either has been pulled back."""

    def loss(params, x):
        both = params["part0"] + params["part1"]
        layer = lambda x, w: (jax.checkpoint(part)(jax.checkpoint(part)(x, w[0]), w[1]), None)
        return jnp.mean(jnp.square(jax.lax.scan(layer, x, (both, params["part1"]))[0] - 1))

    tx, params = optax.sgd(0.1), {name: x for name, x in matrices().items() if name in ("part0", "part1")}
    step = fuse(loss, tx)
    gradients = jax.grad(loss)(params, X)
    expected = optax.apply_updates(params, tx.update(gradients, tx.init(params), params)[0])
    fused = step.jit(copied(params), step.init(params, X), X)
    assert relative_error(fused.params, expected) < 1e-5


def test_a_period_of_layers_without_remat_is_pulled_back_layer_by_layer():
    """It saves the same as in one part, because its layers save only what they hand on: their inputs."""
    found = MODELS["local and global"]()
    step = fuse_lists(found.loss_fn, optax.sgd(1e-2))
    placed = step.place(found.params, *data(0))
    of_layer = sum(x.nbytes for x in jax.tree.leaves(found.params["layers"][0]))
    assert step.plan(placed, *data(0)).gradient_bytes == of_layer


def test_a_layer_of_unlike_parts_without_remat_is_pulled_back_as_one():
    """Otherwise the values between its parts would have to be saved, too."""
    found = MODELS["in parts"]()
    step = fuse_lists(found.loss_fn, optax.sgd(1e-2))
    placed = step.place(found.params, *data(0))
    scan = next(stage for stage in step.plan(placed, *data(0)).stages if isinstance(stage, LayerScan))
    assert sum(map(bool, scan.read_by)) == 1
