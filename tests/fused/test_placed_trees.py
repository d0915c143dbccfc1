"""Steps refuse trees of `step.place` that were changed or meet another state, and functions among leaves."""

import re

import jax
import jax.numpy as jnp
import pytest
from lists_of_layers import MODELS, data

from adalomo_jax import adalomo, fuse

FOUND = MODELS["plain, remat layer"]()
STEP = fuse(FOUND.loss_fn, adalomo(1e-2))
PLACED = STEP.place(FOUND.params, *data(0))


def without(layer):
    layers = [p for i, p in enumerate(PLACED["layers"]) if i != layer]
    return PLACED | {"layers": layers}


def with_one_more():
    stacks = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), PLACED["layers"][0])
    return PLACED | {"layers": [stacks, *PLACED["layers"][1:]]}


CHANGED = {
    "the stacks": (
        lambda: without(0),
        r"params['layers'][0]['down'] is layer 1 of the stack params['layers'][0]['down']",
    ),
    "a layer": (
        lambda: without(3),
        "is a stack of the shape (4, 16, 8), and in params there are places for its layers",
    ),
    "of layers one more": (with_one_more, "is a stack of the shape (5, 16, 8), and in params there are places for its"),
    "the order": (
        lambda: PLACED | {"layers": PLACED["layers"][1:] + PLACED["layers"][:1]},
        "params['layers'][0]['down'] is layer 1 of the stack params['layers'][0]['down'], which is missing",
    ),
}


@pytest.mark.parametrize("what", CHANGED)
@pytest.mark.parametrize("call", ["unplace", "init", "plan", "place"])
def test_a_placed_tree_that_was_changed_is_refused(what, call):
    change, message = CHANGED[what]
    args = () if call == "unplace" else data(0)
    with pytest.raises(ValueError, match=re.escape(message) + ".*step.unplace.*step.place"):
        getattr(STEP, call)(change(), *args)


@pytest.mark.parametrize("jitted", [True, False])
def test_parameters_and_state_are_both_placed_or_neither(jitted):
    step = STEP.jit if jitted else STEP
    for_placed, for_unplaced = STEP.init(PLACED, *data(0)), STEP.init(FOUND.params, *data(0))
    with pytest.raises(
        ValueError, match=r"The state is for parameters of step.place, .*4 layers; these are not placed."
    ):
        step(FOUND.params, for_placed, *data(0))
    with pytest.raises(ValueError, match=r"The parameters are of step.place, .*4 layers; the state .* not placed."):
        step(PLACED, for_unplaced, *data(0))


def test_another_size_is_not_taken_for_a_stack():
    step = fuse(lambda params: sum(jnp.sum(x**2) for x in jax.tree.leaves(params)), adalomo(1e-2))
    state = step.init({"a": jnp.ones((4, 3)), "b": jnp.ones(3)})
    for params in ({"a": jnp.ones(3), "b": jnp.ones(3)}, {"a": jnp.ones((4, 2)), "b": jnp.ones(3), "c": jnp.ones(3)}):
        with pytest.raises(ValueError, match="The state was made for other parameters"):
            step(params, state)


@pytest.mark.parametrize("call", ["place", "init", "plan"])
def test_functions_among_the_parameters_are_refused(call):
    """A whole Equinox model has such leaves."""
    params = FOUND.params | {"activation": jax.nn.relu}
    with pytest.raises(ValueError, match=r"'activation' is the function relu. .*eqx.partition\(model, eqx.is_inexact"):
        getattr(STEP, call)(params, *data(0))


def test_an_equinox_model_is_refused_and_its_arrays_are_not():
    eqx = pytest.importorskip("equinox")
    model, x = eqx.nn.MLP(4, 4, 8, 3, key=jax.random.key(0)), jnp.ones(4)
    step = fuse(lambda model, x: jnp.mean(model(x) ** 2), adalomo(1e-2))
    with pytest.raises(ValueError, match=r"'activation'.*eqx.partition\(model, eqx.is_inexact_array\)"):
        step.init(model, x)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    step = fuse(lambda params, x: jnp.mean(eqx.combine(params, static)(x) ** 2), adalomo(1e-2))
    placed = step.place(params, x)
    assert step.jit(placed, step.init(placed, x), x).loss > 0
