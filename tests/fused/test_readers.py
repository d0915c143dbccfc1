"""The scan computes other reads of its stack that take one layer at a time; the step warns of reads that do not."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.lax import scan
from tiers import always

from adalomo_jax import fuse, lomo

X = jnp.sin(jnp.arange(32.0)).reshape(4, 8)
RANDOM = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(0.3 * RANDOM.standard_normal((3, 8, 8)), jnp.float32),
    "v": jnp.asarray(RANDOM.standard_normal((8, 3, 2)), jnp.float32),
    "b": jnp.linspace(0.5, 1.0, 8),
}


def model(p, x):
    """Runs over ``w`` on its first axis and over ``v`` on its second."""
    layer = lambda h, wv: (h + jnp.tanh(h @ wv[0]) * jnp.sum(wv[1]), None)
    return jnp.mean(scan(layer, x * p["b"], (p["w"], jnp.moveaxis(p["v"], 1, 0)))[0] ** 2)


def cast(p, x):
    """A penalty on float32 weights that the scan reads in bfloat16."""
    layer = lambda h, w: (h + jnp.tanh(h @ w), None)
    h, _ = scan(layer, (x * p["b"]).astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16))
    return jnp.mean(h.astype(jnp.float32) ** 2) + 0.1 * jnp.mean(jnp.abs(p["w"])) + jnp.sum(p["v"] ** 2)


norms = lambda w: jnp.sqrt(jnp.sum(w**2, axis=(1, 2)))
BY_LAYER = {
    "a sum of squares": lambda p, x: model(p, x) + 0.1 * jnp.sum(p["w"] ** 2),
    "before the scan": lambda p, x: 0.1 * sum(jnp.sum(jnp.square(w)) for w in jax.tree.leaves(p)) + model(p, x),
    "the norm of all": lambda p, x: model(p, x) + optax.tree.norm(p),
    "einsum and vdot": lambda p, x: model(p, x) + jnp.einsum("lij,lij->", p["w"], p["w"]) + jnp.vdot(p["w"], p["w"]),
    "a norm of each layer": lambda p, x: model(p, x) + jnp.sum(norms(p["w"]) * jnp.arange(3.0)),
    "the largest of norms": lambda p, x: model(p, x) + jnp.max(jax.vmap(jnp.linalg.norm)(p["w"])),
    "of rows, on another axis": lambda p, x: model(p, x) + jnp.max(jnp.sum(jnp.abs(p["v"]), axis=2)),
    "of columns, before that axis": lambda p, x: model(p, x) + jnp.max(jnp.sum(jnp.abs(p["v"]), axis=0)),
    "with ones": lambda p, x: model(p, x) + jnp.mean((p["w"] / 8) ** 2 * jnp.ones((3, 8, 8))),
    "after a cast": cast,
}
AT_ONCE = {
    "what the scan begins with": lambda p, x: model(p, x * jnp.sum(p["w"] ** 2)),
    "a product with a layer": lambda p, x: model(p, x) + jnp.mean(x @ p["w"][0]),
    "the largest entry": lambda p, x: model(p, x) + jnp.max(p["w"]),
    "a spread around the mean": lambda p, x: model(p, x) + jnp.var(p["w"]),
}


def axes(step, params, *args):
    return {leaf.path: leaf.axis for leaf in step.plan(params, *args).leaves}


def moved(step, *args):
    """The gradient, which LOMO subtracts at a rate of 1, and the result."""
    result = jax.jit(step)(PARAMS, step.init(PARAMS, *args), *args)
    return jax.tree.map(lambda old, new: old - new, PARAMS, result.params), result


def assert_gradients(found, expected):
    for name, want in expected.items():
        np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", always(BY_LAYER, ["a sum of squares", "the norm of all", "of rows, on another axis"]))
def test_layers_are_updated_one_by_one(name):
    loss = BY_LAYER[name]
    step = fuse(loss, lomo(1.0), strict=True)
    on_axis = {"b": None, "w": 0, "v": None if name == "after a cast" else 1}
    assert axes(step, PARAMS, X) == on_axis
    assert_gradients(moved(step, X)[0], jax.jit(jax.grad(loss))(PARAMS, X))


@pytest.mark.parametrize("name", AT_ONCE)
def test_what_reads_several_layers_is_told_of(name):
    loss = AT_ONCE[name]
    step = fuse(loss, lomo(1.0))
    with pytest.warns(UserWarning, match=r"'w' is updated whole, .*: .* gradient of 768 bytes .* strict=True"):
        found, _ = moved(step, X)
    assert axes(step, PARAMS, X) == {"b": None, "w": None, "v": 1}
    assert_gradients(found, jax.jit(jax.grad(loss))(PARAMS, X))
    with pytest.raises(ValueError, match="strict=True, but these cannot be updated layer by layer: 'w'"):
        fuse(loss, lomo(1.0), strict=True).init(PARAMS, X)


def test_nothing_is_said_where_nothing_is_lost():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(model, lomo(1.0)).init(PARAMS, X)
        fuse(BY_LAYER["the norm of all"], lomo(1.0)).init(PARAMS, X)


def test_with_clipping_microbatches_and_results_beside_the_loss():
    def loss(p, x):
        norm = optax.tree.norm(p)
        is_small = jnp.abs(p["w"]) < limit  # in all layers but one
        told = {"norm": norm, "of layers": norms(p["w"]), "all": jnp.all(is_small), "any": jnp.any(~is_small)}
        return model(p, x) + 0.1 * norm, told

    limit = float(jnp.sort(jnp.max(jnp.abs(PARAMS["w"]), axis=(1, 2)))[1]) + 1e-6

    step = fuse(loss, lomo(1.0), has_aux=True, strict=True, microbatches=2, max_grad_norm=0.5)
    found, result = moved(step, X)
    gradient = jax.jit(jax.grad(loss, has_aux=True))(PARAMS, X)[0]
    clipped, _ = optax.clip_by_global_norm(0.5).update(gradient, optax.EmptyState())
    assert_gradients(found, clipped)
    np.testing.assert_allclose(result.aux["norm"], [optax.tree.norm(PARAMS)] * 2, rtol=1e-6)
    assert not result.aux["all"].any() and result.aux["any"].all()
    np.testing.assert_allclose(result.aux["of layers"], [norms(PARAMS["w"])] * 2, rtol=1e-6)


def test_what_is_printed_of_a_norm_comes_before_what_the_layers_print():
    """A norm that the scan computes is known only after the scan, too late to print it in order."""
    calls = []

    def loss(p, x):
        jax.debug.callback(lambda n: calls.append("norm"), jnp.sum(p["w"] ** 2), ordered=True)

        def layer(h, w):
            jax.debug.callback(lambda h: calls.append("layer"), h.mean(), ordered=True)
            return h + jnp.tanh(h @ w), None

        return jnp.mean(scan(layer, x, p["w"])[0])

    step = fuse(loss, lomo(1.0), trainable=lambda path: path == "w")
    with pytest.warns(UserWarning, match="'w' is updated whole"):
        state = step.init(PARAMS, X)
    jax.block_until_ready(jax.jit(step)(PARAMS, state, X))
    jax.effects_barrier()
    assert calls == ["norm", "layer", "layer", "layer"]


@pytest.mark.uncached
def test_a_penalty_costs_no_memory_of_a_stack():
    """The stack is updated in place, and the layers' part in the penalty is not saved for the backward pass."""
    w = jax.ShapeDtypeStruct((16, 64, 64), jnp.float32)
    plain = lambda w, x: jnp.mean(scan(jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w), None)), x, w)[0])
    temporaries = []
    for loss in (plain, lambda w, x: plain(w, x) + 0.1 * jnp.sum(jnp.abs(w))):
        step = fuse(loss, lomo(1e-2))
        x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
        memory = step.jit.lower(w, step.abstract_state(w, x), x).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= w.size * 4
        temporaries.append(memory.temp_size_in_bytes)
    assert temporaries[1] - temporaries[0] < w.size // 16 * 4 * 2
