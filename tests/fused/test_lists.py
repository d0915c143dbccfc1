"""The plan says which leaves in lists of layers were stacked, with which period, and why others were not."""

import jax
import jax.numpy as jnp
import optax
import pytest
from lists_of_layers import DIM, MODELS, apply, data, error, fuse_lists, local_and_global, loop, matrix, model
from tiers import always

from adalomo_jax import adalomo
from adalomo_jax.fused.plan.lists import nth, period_of


def reasons(loss_fn, params, tx=None, *, placed=True, **options):
    """The reason why each leaf is updated where it is."""
    step = fuse_lists(loss_fn, adalomo(1e-2) if tx is None else tx, **options)
    plan = step.plan(step.place(params, *data(0)) if placed else params, *data(0))
    found = dict(zip((leaf.path for leaf in plan.leaves), plan.reasons, strict=True))
    assert all(reason in str(plan) for reason in plan.reasons)
    return found


def with_checkpoints(one_layer):
    """A loop of four layers, each a checkpoint: ``one_layer(i, p, x)``."""

    def loss(params, x, key):
        x = x @ params["into"]
        for i, p in enumerate(params["layers"]):
            x = jax.checkpoint(lambda p, x, i=i: one_layer(i, p, x))(p, x)
        return error(x @ params["head"])

    return model(4, loss, {})


def narrow_in_the_middle():
    found = MODELS["plain, remat layer"]()
    found.params["layers"][3] |= {"up": matrix(1, DIM, DIM), "down": matrix(2, DIM, DIM)}
    return found


def reads_another_value():
    """The last layer also reads the first layer's input; each other layer reads its own instead."""

    def loss(params, x, key):
        first = x = x @ params["into"]
        for i, p in enumerate(params["layers"]):
            x = apply(p, x) + (jnp.tanh(first) if i == 3 else jnp.tanh(x))
        return error(x @ params["head"])

    return model(4, loss, {})


def all_in_one_checkpoint():
    """Layers under one remat, none of them like the next."""
    activations = [jax.nn.relu, jnp.tanh, jnp.sin]

    def loss(params, x, key):
        def run(layers, x):
            for p, activation in zip(layers, activations):
                x = apply(p, x, activation)
            return x

        return error(jax.checkpoint(run)(params["layers"], x @ params["into"]) @ params["head"])

    return model(3, loss, {})


def all_in_one_list():
    """Alternating scales and matrices in one list, as in Keras."""

    def loss(params, x, key):
        for scale, w in zip(params["all"][::2], params["all"][1::2]):
            x = x + jnp.tanh((x * scale) @ w)
        return error(x)

    return model(0, loss, {}, all=[x for i in range(2) for x in (jnp.ones(DIM), matrix(i, DIM, DIM))])


STACKED = "a scan runs over its 3 layers, stacked from a list"
CASES = {
    "three alike": (lambda: model(3, loop(lambda i: jnp.sin), {}), {"layers/0/up": STACKED}),
    "two alike": (
        lambda: model(2, loop(lambda i: jnp.sin), {}),
        {f"layers/{i}/up": "only 2 layers in a row are alike" for i in range(2)},
    ),
    "another operation": (
        MODELS["interrupted"],
        {"layers/0/up": STACKED}
        | {f"layers/3/{name}": "layers/3 computes `sin`, but layers/2 computes `max`" for name in ("up", "down")},
    ),
    "the first and the last": (
        MODELS["other ends"],
        {
            "layers/0/up": "layers/0 computes `sin`, but layers/1 computes `max`",
            "layers/5/up": "layers/5 computes `sin`, but layers/4 computes `max`",
        },
    ),
    "tied": (
        MODELS["tied"],
        {
            "layers/0/up": STACKED,
            "layers/3/up": "it is read elsewhere, too",
            "layers/3/down": "layers/3/up is read elsewhere, too",
            "layers/4/up": "only 2 layers in a row are alike",
            "layers/5/down": "only 2 layers in a row are alike",
        },
    ),
    "a period with a remainder": (
        MODELS["local and global, one over"],
        {f"layers/{i}/up": "a scan runs over its 3 layers, every 3rd of a list" for i in range(3)}
        | {"layers/9/up": "1 layer is left over by a period of 3"},
    ),
    "two left over": (lambda: local_and_global(11), {"layers/9/up": "2 layers are left over by a period of 3"}),
    "another derivative": (
        MODELS["other derivative"],
        {"layers/3/up": "layers/3 computes `tanh` with another derivative than layers/2"},
    ),
    "another constant": (
        lambda: with_checkpoints(lambda i, p, x: apply(p, x * (2.0 if i == 3 else 1.5))),
        {"layers/0/up": STACKED, "layers/3/up": "layers/3 computes `mul` with another constant than layers/2"},
    ),
    "another parameter of an operation": (
        lambda: with_checkpoints(lambda i, p, x: apply(p, jax.lax.cumsum(x, 1, reverse=i == 3))),
        {"layers/3/up": "layers/3 computes `cumsum` with another `reverse` than layers/2"},
    ),
    "another order in a checkpoint": (
        lambda: with_checkpoints(lambda i, p, x: apply(p, x / jnp.exp(x) if i == 3 else jnp.exp(x) / x)),
        {"layers/3/up": "layers/3 computes `checkpoint` differently than layers/2"},
    ),
    "another shape": (
        narrow_in_the_middle,
        {
            "layers/3/up": "it is float32[8,8], and layers/2/up is float32[8,16]",
            "layers/3/scale": "layers/3 computes `dot_general` of float32[2,5,8] and float32[8,8], but layers/2 "
            "computes `dot_general` of float32[2,5,8] and float32[8,16]",
        },
    ),
    "another value": (reads_another_value, {"layers/3/up": "layers/3 computes `tanh` of another value than layers/2"}),
    "one checkpoint": (
        all_in_one_checkpoint,
        {"layers/1/up": "one checkpoint runs layers/1 and layers/0, and fewer than 3 layers repeat inside it"},
    ),
    "no list": (MODELS["tied"], {"into": "no scan reads it", "head": "the loss does not read it"}),
    "a list of arrays of several kinds": (all_in_one_list, {f"all/{i}": "no scan reads it" for i in range(4)}),
    "side by side: no layer's output is another's input": (
        MODELS["side by side"],
        {"products/1/0": "no scan reads it"},
    ),
}


SLOW = ["two left over", "another derivative", "another parameter of an operation", "another order in a checkpoint"]
SLOW += ["two alike", "another operation", "tied"]
SLOW += ["another value", "another constant", "a period with a remainder", "a list of arrays of several kinds"]
"""The other cases say why by the same comparisons."""


@pytest.mark.parametrize("case", always(CASES, CASES.keys() - set(SLOW)))
def test_why(case):
    make, expected = CASES[case]
    found = make()
    of_leaves = reasons(found.loss_fn, found.params)
    assert {path: of_leaves[path] for path in expected} == expected


@pytest.mark.parametrize("placed", [True, False])
def test_a_layer_that_a_mask_names(placed):
    """If `trainable` freezes one leaf of a layer, the whole layer stays by itself."""
    found = MODELS["plain, remat layer"]()
    of_leaves = reasons(
        found.loss_fn, found.params, placed=placed, trainable=lambda path: not path.startswith("layers/3/up")
    )
    assert of_leaves["layers/0/up"] == (STACKED if placed else "it is one of 3 layers in a list that repeat")
    assert of_leaves["layers/3/up"] == "it is not trained, and layers/2/up is"
    assert of_leaves["layers/3/down"] == "layers/3/up is not trained, and layers/2/up is"
    assert of_leaves["into"] == "no scan reads it"


def test_frozen_leaves_that_are_not_stacked():
    found = MODELS["interrupted"]()
    of_leaves = reasons(found.loss_fn, found.params, trainable=lambda path: not path.endswith("up"))
    assert of_leaves["layers/0/up"] == "it is not trained"
    expected = "it is not trained, nor stacked: layers/3 computes `sin`, but layers/2 computes `max`"
    assert of_leaves["layers/3/up"] == expected


def test_a_layer_that_tx_treats_otherwise():
    found = MODELS["plain, remat layer"]()
    labels = {"into": "fast", "head": "fast", "layers": ["slow", "fast", "fast", "fast"]}
    tx = optax.multi_transform({"slow": optax.sgd(1e-3), "fast": optax.adamw(1e-2)}, labels)
    for placed in (True, False):
        of_leaves = reasons(found.loss_fn, found.params, tx, placed=placed)
        assert of_leaves["layers/0/up"] == "it is treated differently by tx than layers/1/up"


def test_strict_refuses_only_what_place_would_stack():
    """Without `tx`'s labels three layers repeat; with them none do, placed or not."""
    found = model(3, loop(lambda i: jnp.sin), {})
    labels = {"into": "fast", "head": "fast", "layers": ["fast", "slow", "fast"]}
    tx = optax.multi_transform({"slow": optax.sgd(1e-3), "fast": optax.sgd(1e-2)}, labels)
    step = fuse_lists(found.loss_fn, tx, strict=True)
    step.init(step.place(found.params, *data(0)), *data(0))
    assert "repeat" not in str(step.plan(found.params, *data(0)))
    with pytest.raises(ValueError, match="3 layers repeat in a list"):
        fuse_lists(found.loss_fn, optax.sgd(1e-2), strict=True).init(found.params, *data(0))


def test_a_stack_for_another_loss_has_no_reasons_of_this_one():
    """If the search does not find the stacked layers, the plan says less."""
    found, other = MODELS["plain, remat layer"](), model(4, loop(lambda i: jnp.sin if i == 1 else jax.nn.relu), {})
    step = fuse_lists(found.loss_fn, adalomo(1e-2), trainable=lambda path: "3" not in path)
    placed = step.place(found.params, *data(0))
    plan = fuse_lists(other.loss_fn, adalomo(1e-2), trainable=lambda path: "3" not in path).plan(placed, *data(0))
    of_leaves = dict(zip((leaf.path for leaf in plan.leaves), plan.reasons))
    assert of_leaves["layers/0/up"] == "layers of a list do not repeat in this loss"
    assert of_leaves["layers/3/up"] == "it is not trained"


def test_periods_and_ordinals():
    assert period_of(["layers/1/up", "layers/7/up", "layers/13/up"]) == 6
    assert period_of(["block_0/mlp_1/w", "block_1/mlp_1/w"]) == 1
    assert period_of(["a/0/w", "a/1/w", "a/3/w"]) is None and period_of(["first", "second"]) is None
    assert [nth(n) for n in (2, 3, 6, 11, 12, 21, 111)] == ["2nd", "3rd", "6th", "11th", "12th", "21st", "111th"]
