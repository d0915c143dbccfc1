"""Trains a loss over lists of layers for some steps: with plain Optax, and with `fuse` on placed parameters."""

import jax
import optax
from comparison import copied
from lists_of_layers import data

STEPS = 5


def by_optax(loss_fn, tx, params, trainable=lambda path: True):
    """The parameters after some steps of plain Optax, on the tree as it is."""
    tx, path_of = optax.with_extra_args_support(tx), lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    mask = jax.tree_util.tree_map_with_path(lambda path, _: trainable(path_of(path)), params)
    tx = optax.chain(optax.masked(tx, mask), optax.masked(optax.set_to_zero(), jax.tree.map(lambda x: not x, mask)))
    state = tx.init(params)

    @jax.jit
    def step(params, state, *args):
        loss, grads = jax.value_and_grad(loss_fn)(params, *args)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    for i in range(STEPS):
        params, state = step(params, state, *data(i))
    return params


def by_fuse(step, params):
    """The parameters after some steps, in the caller's tree, and the plan."""
    placed = step.place(params, *data(0))
    plan, state, placed = step.plan(placed, *data(0)), step.init(placed, *data(0)), copied(placed)
    for i in range(STEPS):
        placed, state, *_ = step.jit(placed, state, *data(i))
    return step.unplace(placed), plan
