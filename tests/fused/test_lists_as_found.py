"""Library models with lists of layers take two more lines and equal plain Optax on their own trees."""

import jax
import optax
import pytest
from comparison import copied, relative_error
from found_model import Sizes
from lists_as_found import MODELS
from lists_of_layers import fuse_lists
from tiers import always

from adalomo_jax import adalomo

SIZES = Sizes(layers=4, batch=2, length=5)
OF_LAYER = {"linen": 5, "lm1b": 12, "haiku": 6, "equinox": 6}
"""The number of a layer's parameters."""


@pytest.mark.parametrize("name", always(MODELS, ["linen"]))
def test_equals_optax_on_the_models_own_tree(name):
    loss_fn, params, batch, *_ = MODELS[name](SIZES)
    step, tx, x = fuse_lists(loss_fn, adalomo(1e-2)), adalomo(1e-2), batch(0)
    placed = copied(step.place(params, *x))
    stacked = [leaf for leaf in step.plan(placed, *x).leaves if leaf.layers == SIZES.layers]
    assert len(stacked) == OF_LAYER[name] and all(len(leaf.layer_paths) == SIZES.layers for leaf in stacked)
    state, expected, of_optax = step.init(placed, *x), params, tx.init(params)

    @jax.jit
    def by_optax(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params, *x), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        placed, state, *_ = step.jit(placed, state, *x)
        expected, of_optax = by_optax(expected, of_optax)
    assert relative_error(step.unplace(placed), expected) < 1e-5
    assert relative_error(expected, params) > 1e-3
