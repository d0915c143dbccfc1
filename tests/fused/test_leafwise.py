"""`fuse` refuses a transformation that mixes leaves, by name, and accepts one that does not."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from adalomo_jax import adalomo, fuse, lomo

PARAMS = {"a": jnp.ones((3, 2)), "layers": jnp.ones((4, 2, 2))}


def loss_fn(params):
    x, _ = jax.lax.scan(lambda x, w: (x @ w, None), params["a"], params["layers"])
    return jnp.sum(x)


def share_momentum():
    """Mixes leaves through the state only: a leaf's update depends on earlier gradients of all leaves."""

    def update(updates, state, params=None):
        del params
        mean = sum(jnp.mean(g) for g in jax.tree.leaves(updates))
        return jax.tree.map(lambda g: g * state, updates), 0.9 * state + mean

    return optax.GradientTransformation(lambda params: jnp.zeros([]), update)


def record_norm():
    """Leaves the updates unchanged, but keeps their global norm."""
    return optax.GradientTransformation(
        lambda params: jnp.zeros([]), lambda updates, state, params=None: (updates, optax.tree.norm(updates))
    )


def by_number():
    """Divides by the number of leaves, which is not in the data."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda g: g / len(jax.tree.leaves(updates)), updates))


def init_from_all():
    """Mixes leaves in ``init`` only: it keeps their global norm for each."""

    def init(params):
        norm = optax.tree.norm(params)
        return jax.tree.map(lambda p: norm, params)

    return optax.GradientTransformation(
        init, lambda updates, state, params=None: (jax.tree.map(jnp.multiply, updates, state), state)
    )


def draws_in_a_branch():
    def draw(g):
        return g + jax.random.normal(jax.random.key(0), g.shape)

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda g: jax.lax.cond(state > 1, draw, lambda g: g, g), updates), state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), update)


def draws_in_init():
    def init(params):
        return jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


def counts_by_leaf():
    """Counts the steps of all leaves, in state that belongs to no leaf."""

    def update(updates, state, params=None):
        del params
        counts = jax.tree.map(lambda n: n + 1, state[0])
        return updates, (counts, sum(jax.tree.leaves(counts)))

    def init(params):
        return jax.tree.map(lambda p: jnp.zeros([], jnp.int32), params), jnp.zeros([], jnp.int32)

    return optax.GradientTransformation(init, update)


def in_a_loop(body):
    """All leaves go through one loop together."""

    def update(updates, state, params=None):
        del params
        return jax.lax.fori_loop(0, 3, lambda _, updates: body(updates), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def in_a_while_loop(goes_on):
    def update(updates, state, params=None):
        del params
        halve = lambda carry: (carry[0] + 1, jax.tree.map(lambda g: g / 2, carry[1]))
        return jax.lax.while_loop(goes_on, halve, (0, updates))[1], state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def add_next(updates):
    """Each iteration mixes neighbours."""
    leaves, treedef = jax.tree.flatten(updates)
    return treedef.unflatten([g + jnp.sum(other) for g, other in zip(leaves, leaves[1:] + leaves[:1])])


def clips_the_stack():
    """Clips by the norm of one leaf, but this leaf has many layers."""
    rules: Any = {"x": optax.clip_by_global_norm(1.0), "y": optax.sgd(1.0)}
    return optax.multi_transform(rules, {"a": "y", "layers": "x"})


MIXING = {
    "global norm": (optax.clip_by_global_norm(1.0), "the update of 'a' depends on the gradient of 'layers'"),
    "late in a chain": (optax.chain(adalomo(1e-2), optax.clip_by_global_norm(1.0)), "the update of 'a'"),
    "by their number": (by_number(), "the update of 'a' is computed differently among all leaves"),
    "in init": (init_from_all(), "the update of 'a' depends on the parameter 'layers'"),
    "random numbers in a branch": (draws_in_a_branch(), "draws random numbers"),
    "random numbers in init": (draws_in_init(), "draws random numbers"),
    "state of leaves": (counts_by_leaf(), r"its state\[1\] depends on state that is kept for leaves"),
    "in a loop": (in_a_loop(add_next), "the update of 'a' depends on the gradient of 'layers'"),
    "what a loop waits for": (
        in_a_while_loop(lambda carry: optax.tree.norm(carry[1]) > 1),
        "the update of 'a' depends on the gradient of 'layers'",
    ),
    "layers of one stack": (
        clips_the_stack(),
        "the update of one layer of 'layers' depends on the gradient of another layer of 'layers'",
    ),
    "a new measurement": (optax.monitor({"norm": optax.tree.norm}), r"state\.measurements\['norm'\] is not what"),
    "finite check": (optax.apply_if_finite(adalomo(1e-2), 3), "tx mixes leaves"),
    "through the state": (share_momentum(), "tx mixes leaves"),
    "random numbers": (optax.noisy_sgd(1e-3, key=0), "draws random numbers"),
    "layer_axes": (adalomo(1e-2, layer_axes={"a": None, "layers": 0}), "leave layer_axes out of tx"),
    "in the state only": (record_norm(), "its state depends on the gradients of 'a', 'layers'"),
}


@pytest.mark.parametrize("name", MIXING)
def test_refuses_what_mixes_leaves(name):
    tx, message = MIXING[name]
    with pytest.raises(ValueError, match=message):
        fuse(loss_fn, tx).init(PARAMS)


SEPARATE = {
    "adalomo": adalomo(optax.linear_schedule(1e-2, 0.0, 10), weight_decay=0.1),
    "lomo": lomo(1e-2, clip_value=1.0),
    "adafactor": optax.adafactor(1e-3),
    "nadamw": optax.nadamw(1e-3),
    "lamb": optax.lamb(1e-3),
    "adaptive clipping": optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(1e-2)),
    "block clipping": optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(1e-2, momentum=0.9, nesterov=True)),
    "inject_hyperparams": optax.inject_hyperparams(optax.lion)(learning_rate=optax.constant_schedule(1e-3)),
    "multi_transform": optax.multi_transform({"x": adalomo(1e-2), "y": optax.adam(1e-3)}, {"a": "x", "layers": "y"}),
    "a loop over all": in_a_loop(lambda updates: jax.tree.map(lambda g: g / 2, updates)),
    "a while loop over all": in_a_while_loop(lambda carry: carry[0] < 3),
    "a mask by path": optax.adamw(
        1e-3, mask=lambda p: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "layers", p)
    ),
    "schedule-free": optax.contrib.schedule_free_adamw(1e-3),
}


def test_refuses_it_with_the_state_of_another():
    plain, clipped = optax.identity(), optax.clip_by_global_norm(1e-3)
    state = fuse(loss_fn, optax.chain(plain, optax.sgd(1.0))).init(PARAMS)
    with pytest.raises(ValueError, match="tx mixes leaves"):
        fuse(loss_fn, optax.chain(clipped, optax.sgd(1.0)))(PARAMS, state)


@pytest.mark.parametrize("name", SEPARATE)
def test_accepts_what_treats_leaves_separately(name):
    step = fuse(loss_fn, SEPARATE[name])
    state = step.init(PARAMS)
    assert jax.tree.structure(jax.eval_shape(step, PARAMS, state).state) == jax.tree.structure(state)


@pytest.mark.parametrize("tx", [optax.clip_by_global_norm(1.0), by_number()], ids=["norm", "number"])
def test_refuses_what_mixes_the_layers_of_the_only_leaf(tx):
    stack = PARAMS["layers"]
    loss = lambda layers: loss_fn({"a": jnp.ones((3, 2)), "layers": layers})
    with pytest.raises(ValueError, match="tx mixes leaves: the update of one layer of ''"):
        fuse(loss, tx).init(stack)
    fuse(loss, optax.adam(1e-3)).init(stack)


def test_state_for_no_leaf_is_of_the_dtype_that_optax_gives_it():
    """Optax goes by the dtypes of all parameters, not just of those that are updated first."""
    params = {"a": PARAMS["a"], "layers": PARAMS["layers"].astype(jnp.bfloat16)}
    loss = lambda p: loss_fn({"a": p["a"], "layers": p["layers"].astype(jnp.float32)})
    tx = optax.contrib.reduce_on_plateau()
    plain: Any = tx.init(params)
    fused = fuse(loss, tx).init(params).inner
    assert [x.dtype for x in fused] == [x.dtype for x in plain]
    assert plain.scale.dtype == jnp.bfloat16 and plain.best_value.dtype == jnp.float32


def test_the_proof_is_made_once():
    calls = []

    def update(updates, state, params=None):
        calls.append(0)
        return updates, state

    step = fuse(loss_fn, optax.GradientTransformation(lambda params: optax.EmptyState(), update))
    step.plan(PARAMS)
    proof = len(calls)
    state = step.init(PARAMS)
    assert len(calls) == proof
    jax.eval_shape(step, PARAMS, state)
    assert len(calls) < 2 * proof
