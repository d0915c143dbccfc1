"""Lists of layers in decoders like jax-ml/bonsai's are stacked, and train as with an NNX optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoders import LENGTH, SEGMENTS, TOKENS, Config, Decoder, Reach, caches
from flax import nnx
from tiers import slow

from adalomo_jax import adalomo, fuse
from adalomo_jax.nnx import FusedOptimizer

CONFIG = Config(reach=[Reach.NEAR, Reach.NEAR, Reach.ALL, Reach.NEAR])
OF_LAYER = 11
"""A layer's parameters: two norms, two more for queries and keys, four attention and three feed-forward kernels."""


def cross_entropy(model, cache):
    logits = model(TOKENS, SEGMENTS, cache)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:])
    return jnp.mean(losses, where=SEGMENTS[:, 1:] != 0)


def assert_equal(node, other):
    state = lambda node: jax.tree_util.tree_leaves_with_path(nnx.as_pure(nnx.state(node)))
    for (path, a), (_, b) in zip(state(node), state(other), strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-6, err_msg=jax.tree_util.keystr(path))


def reference(steps, cache=None):
    """The model trained by ``nnx.Optimizer``, which moves each weight by more than rounding."""
    model = Decoder(CONFIG, nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model, nnx.Param)))
    optimizer = nnx.Optimizer(model, adalomo(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer, cache):
        optimizer.update(model, nnx.grad(cross_entropy)(model, cache))

    for _ in range(steps):
        train(model, optimizer, cache)
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), nnx.as_pure(nnx.state(model, nnx.Param)), before)
    assert min(jax.tree.leaves(moved)) > 1e-5
    return model


@pytest.mark.parametrize("cached", [slow(False), slow(True)])
def test_fused_optimizer(cached):
    """It trains without a cache, and with one that the loss takes as an argument and writes."""
    steps = 2 if cached else 5  # the cache has room for only two
    cache, its_cache = (caches(CONFIG) if cached else None for _ in range(2))
    expected, model = reference(steps, its_cache), Decoder(CONFIG, nnx.Rngs(0))
    optimizer = FusedOptimizer(model, adalomo(1e-2), cross_entropy, cache, roll=CONFIG.layers)
    for _ in range(steps):
        optimizer.step(model, cache)
    stacks = [leaf for leaf in optimizer.plan(model, cache).leaves if leaf.layer_paths]
    assert [leaf.layers for leaf in stacks] == [CONFIG.layers] * OF_LAYER
    optimizer.unplace(model)
    assert_equal(model, expected)
    if cache is not None and its_cache is not None:
        assert int(cache[3].at[...]) == steps * LENGTH
        assert_equal(cache, its_cache)


@pytest.mark.slow
def test_split_and_placed():
    """The functional step trains the same weights."""
    graphdef, params, rest = nnx.split(Decoder(CONFIG, nnx.Rngs(0)), nnx.Param, ...)
    loss_fn = lambda params, rest: cross_entropy(nnx.merge(graphdef, params, rest), None)
    step = fuse(loss_fn, adalomo(1e-2), roll=CONFIG.layers)
    params = step.place(params, rest)
    state = step.init(params, rest)
    for _ in range(5):
        params, state, *_ = step.jit(params, state, rest)
    assert sum(len(leaf.layer_paths) for leaf in step.plan(params, rest).leaves) == OF_LAYER * CONFIG.layers
    assert_equal(nnx.merge(graphdef, step.unplace(params), rest), reference(5))
