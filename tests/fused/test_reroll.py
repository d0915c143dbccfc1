"""Layers in Python lists are stacked between the steps and scanned within them; the rest is the caller's tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import RULES, copied, relative_error
from list_training import STEPS, by_fuse, by_optax
from lists_of_layers import DIM, MODELS, apply, data, error, fuse_lists, loop, matrix, model, of_layer
from tiers import always, slow

from adalomo_jax import adalomo, fuse


def by_plan(step, params):
    """The plan of placed parameters."""
    return step.plan(step.place(params, *data(0)), *data(0))


def stacks_in(plan):
    return {leaf.path: len(leaf.layer_paths) for leaf in plan.leaves if leaf.layer_paths}


ALWAYS = ["plain, remat layer"]


@pytest.mark.parametrize("name", always(MODELS, ALWAYS))
def test_equals_optax_on_the_list(name):
    found = MODELS[name]()
    frozen = "layers" if name == "adapters" else "none"
    trainable = lambda path: not path.startswith(frozen)
    step = fuse_lists(found.loss_fn, adalomo(1e-2), trainable=trainable)
    rolled, plan = by_fuse(step, found.params)
    assert stacks_in(plan) == found.stacks
    assert all(leaf.layers == len(leaf.layer_paths) for leaf in plan.leaves if leaf.layer_paths and leaf.trained)
    expected = by_optax(found.loss_fn, adalomo(1e-2), found.params, trainable)
    assert relative_error(rolled, expected) < (0.02 if name == "cast" else 1e-5)
    assert relative_error(expected, found.params) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["adamw", slow("adalomo")])
def test_a_state_is_converted_both_ways(rule):
    found = MODELS["other ends"]()
    step = fuse_lists(found.loss_fn, RULES[rule], loss_scale=1.0)
    params, state = copied(found.params), step.init(found.params, *data(0))
    params, state, *_ = step.jit(params, state, *data(0))
    placed = step.place(params, *data(0))
    of_stacks = step.place_state(state, placed, *data(0))
    assert jax.tree.structure(of_stacks) == jax.tree.structure(step.abstract_state(placed, *data(0)))
    jax.tree.map(np.testing.assert_array_equal, step.unplace_state(of_stacks, placed, *data(0)), state)
    on = step.jit(copied(placed), copied(of_stacks), *data(1))
    off = step.jit(copied(params), copied(state), *data(1))
    assert relative_error(step.unplace(on.params), off.params) < 1e-6
    assert relative_error(step.unplace_state(on.state, placed, *data(0)).inner, off.state.inner) < 1e-5


@pytest.mark.parametrize("policy", ["equal", "another"])
def test_policies_made_for_each_layer(policy):
    """The step compares policies by their contents, not by identity."""
    names = {"equal": ["a"] * 4, "another": ["a", "a", "a", "b"]}[policy]
    policies = [
        jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(name)
        )
        for name in names
    ]

    def loss(params, x, key):
        for p, policy in zip(params["layers"], policies):
            x = jax.checkpoint(apply, policy=policy)(p, x)
        return error(x @ params["head"])

    params = MODELS["plain, remat layer"]().params
    plan = by_plan(fuse_lists(loss, adalomo(1e-2)), params)
    assert stacks_in(plan) == of_layer("layers/0", 4 if policy == "equal" else 3)


@pytest.mark.slow
def test_a_layer_that_is_not_trained_stays_by_itself():
    found = MODELS["plain, remat layer"]()
    trainable = lambda path: not path.startswith("layers/3/up")
    rolled, plan = by_fuse(fuse_lists(found.loss_fn, adalomo(1e-2), trainable=trainable), found.params)
    assert stacks_in(plan) == of_layer("layers/0", 3)
    expected = by_optax(found.loss_fn, adalomo(1e-2), found.params, trainable)
    assert relative_error(rolled, expected) < 1e-5
    np.testing.assert_array_equal(rolled["layers"][3]["up"], found.params["layers"][3]["up"])


@pytest.mark.parametrize("how", ["labels", "mask"])
def test_a_layer_that_tx_treats_otherwise_stays_by_itself(how):
    found = MODELS["plain, remat layer"]()
    is_other = lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: "[0]" in jax.tree_util.keystr(path), tree)
    if how == "labels":
        labels = lambda tree: jax.tree.map(lambda other: "slow" if other else "fast", is_other(tree))
        tx = optax.multi_transform({"slow": optax.sgd(1e-3), "fast": optax.adamw(1e-2)}, labels)
    else:
        tx = optax.chain(
            optax.scale_by_adam(), optax.masked(optax.scale(0.1), is_other(found.params)), optax.scale(-1e-2)
        )
    rolled, plan = by_fuse(fuse_lists(found.loss_fn, tx), found.params)
    assert stacks_in(plan) == of_layer("layers/1", 3)
    assert relative_error(rolled, by_optax(found.loss_fn, tx, found.params)) < 1e-5


OPTIONS = {
    "clipped": dict(max_grad_norm=0.1),
    "microbatches": dict(microbatches=2, batch_argnums=1),
    "microbatches, clipped": dict(microbatches=2, batch_argnums=1, max_grad_norm=0.1),
    "scaled": dict(loss_scale=2.0**10),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain, remat layer", "encoder and decoder"])
def test_equals_the_unfused_step_on_the_list(name, option):
    """Each option equals plain gradients of the list, computed all at once."""
    found = MODELS[name]()
    step = fuse_lists(found.loss_fn, adalomo(1e-2), rms_metrics=True, **OPTIONS[option])
    placed = copied(step.place(found.params, *data(0)))
    state, of_list = step.init(placed, *data(0)), step.init(found.params, *data(0))
    params = copied(found.params)
    for i in range(STEPS):
        expected = jax.jit(step.unfused)(params, of_list, *data(i))
        actual = step.jit(placed, state, *data(i))
        params, of_list, placed, state = *expected[:2], *actual[:2]
    assert relative_error(step.unplace(actual.params), expected.params) < 1e-5
    assert relative_error(actual.metrics, expected.metrics) < 1e-4
    assert relative_error(actual.loss, expected.loss) < 1e-5


def test_place_gives_back_what_it_was_given():
    """``unplace`` returns the same bits, also in bfloat16. Placing again changes nothing, nor does roll=False."""
    found = MODELS["interrupted"]()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), found.params)
    step = fuse_lists(found.loss_fn, adalomo(1e-2))
    placed = step.place(params, *data(0))
    assert "InStack(stack=\"['layers'][0]['up']\", layer=2)" in str(placed["layers"][2])
    jax.tree.map(np.testing.assert_array_equal, step.unplace(placed), params)
    assert jax.tree.structure(step.place(placed, *data(0))) == jax.tree.structure(placed)
    unrolled = fuse(found.loss_fn, adalomo(1e-2), roll=False).place(params, *data(0))
    assert jax.tree.structure(unrolled) == jax.tree.structure(params)


def test_stochastic_rounding_is_that_of_a_scan():
    """The keys and so the bits are the same as for a loss that scans over the stacks."""
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))

    def of_list(params, x):
        for w in params["layers"]:
            x, _ = layer(x, w)
        return error(x)

    of_stack = lambda params, x: error(jax.lax.scan(layer, x, params["layers"])[0])
    layers = [matrix(i, DIM, DIM).astype(jnp.bfloat16) for i in range(4)]
    x = data(0)[0].astype(jnp.bfloat16)
    listed, scanned = fuse_lists(of_list, adalomo(1e-2)), fuse_lists(of_stack, adalomo(1e-2))
    p, q = listed.place({"layers": layers}, x), {"layers": jnp.stack(layers)}
    s, t = listed.init(p, x), scanned.init(q, x)
    for _ in range(3):
        (p, s, *_), (q, t, *_) = listed.jit(p, s, x), scanned.jit(q, t, x)
    np.testing.assert_array_equal(p["layers"][0], q["layers"])


def test_a_plan_says_what_a_list_costs_and_strict_refuses_it():
    found = MODELS["plain, remat None"]()
    step = fuse_lists(found.loss_fn, adalomo(1e-2), strict=True)
    with pytest.raises(
        ValueError, match=r"strict=True, but 4 layers repeat in a list, .* step\.place\(params, \*args\)"
    ):
        step.init(found.params, *data(0))
    plan = str(fuse_lists(found.loss_fn, adalomo(1e-2)).plan(found.params, *data(0)))
    all_bytes = 4 * (4 * (2 * DIM * 2 * DIM + DIM) + 2 * DIM * DIM)
    assert plan.endswith(
        f"gradients alive at once: {all_bytes:,} of {all_bytes:,} bytes\n"
        "4 layers in a list repeat. step.place(params, *args) (FusedOptimizer and TrainState: roll=True) stacks them: "
        "then only one layer's gradients are alive at a time"
    )
    one_layer = 4 * (2 * DIM * 2 * DIM + DIM)
    assert str(by_plan(step, found.params)).endswith(f"gradients alive at once: {one_layer:,} of {all_bytes:,} bytes")


@pytest.mark.slow
def test_few_layers_without_checkpoints_stay_in_their_list():
    """In a list they take less memory. The plan says how to stack them; strict refuses them: gradients may be alive."""
    few, enough = (model(n, loop(lambda i: jax.nn.gelu), {}) for n in (5, 6))
    step = fuse(few.loss_fn, adalomo(1e-2))
    assert jax.tree.structure(step.place(few.params, *data(0))) == jax.tree.structure(few.params)
    plan = step.plan(few.params, *data(0))
    assert "\n5 layers in a list repeat, but too few for a stack to save memory" in str(
        plan
    ) and "fuse(..., roll=5)" in str(plan)
    assert "it is one of 5 layers in a list that repeat" in plan.reasons
    with pytest.raises(ValueError, match=r"strict=True, but 5 layers repeat in a list, .* roll=5 and params = step"):
        fuse(few.loss_fn, adalomo(1e-2), strict=True).init(few.params, *data(0))
    assert stacks_in(by_plan(fuse(few.loss_fn, adalomo(1e-2), roll=5), few.params)) == of_layer("layers/0", 5)
    assert stacks_in(by_plan(fuse(few.loss_fn, adalomo(1e-2), roll=6), few.params)) == {}
    assert stacks_in(by_plan(fuse(enough.loss_fn, adalomo(1e-2)), enough.params)) == of_layer("layers/0", 6)


def test_few_layers_with_checkpoints_are_stacked():
    """Three layers are enough if the checkpoints read all weights."""
    checked, in_part = MODELS["plain, remat layer"](), MODELS["plain, remat part"]()
    assert stacks_in(by_plan(fuse(checked.loss_fn, adalomo(1e-2)), checked.params)) == checked.stacks
    assert stacks_in(by_plan(fuse(in_part.loss_fn, adalomo(1e-2)), in_part.params)) == {}


@pytest.mark.parametrize("roll", [True, False])
def test_a_loop_over_a_stack_of_ones_own(roll):
    """A loop that takes single layers out of a stack needs no ``place``."""

    def loss(params, x, key):
        for i in range(4):
            x = jax.checkpoint(lambda w, x: x + jnp.tanh(x @ w))(params["layers"][i], x)
        return error(x)

    params = {"layers": jnp.stack([0.5 * matrix(i, DIM, DIM) for i in range(4)])}
    plan = fuse(loss, adalomo(1e-2), roll=roll).plan(params, *data(0))
    assert plan.leaves[0].layers == (4 if roll else None)
    if roll:
        rolled, _ = by_fuse(fuse_lists(loss, adalomo(1e-2)), params)
        layers = [params["layers"][i] for i in range(4)]
        of_list = lambda params, x, key: loss({"layers": jnp.stack(params)}, x, key)
        assert relative_error(rolled["layers"], jnp.stack(by_optax(of_list, adalomo(1e-2), layers))) < 1e-5


@pytest.mark.slow
def test_derivatives_within_a_shard_map():
    """The function's axis has a name only there, so the step neither compares it nor stacks layers that call it."""
    mesh = jax.make_mesh((2,), ("parts",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    total = jax.custom_vjp(lambda x: jax.lax.psum(x, "parts"))
    total.defvjp(lambda x: (jax.lax.psum(x, "parts"), None), lambda _, d: (d,))
    spec = jax.P("parts")
    product = jax.shard_map(
        lambda x, w: total(x @ w),
        mesh=mesh,
        in_specs=(jax.P(None, None, "parts"), spec),
        out_specs=jax.P(),
        check_vma=False,
    )

    def loss(params, x, key):
        for w in params["layers"]:
            x = x + jnp.tanh(product(x, w))
        return error(x)

    params = {"layers": [matrix(i, DIM, DIM) for i in range(3)]}
    updated, plan = by_fuse(fuse_lists(loss, adalomo(1e-2)), params)
    assert stacks_in(plan) == {} and "gradients alive at once" in str(plan)
    assert relative_error(updated, by_optax(loss, adalomo(1e-2), params)) < 1e-5


def test_stacks_that_another_loss_does_not_run_over_are_told_of():
    found, other = MODELS["plain, remat layer"](), MODELS["other ends"]()
    placed = fuse_lists(found.loss_fn, adalomo(1e-2)).place(found.params, *data(0))
    step = fuse(lambda params, x, key: other.loss_fn(params, x, key) + error(params["layers"][1]["up"]), adalomo(1e-2))
    with pytest.warns(UserWarning, match=r"'layers/0/up' is updated whole, though its layers are stacked: .* a list"):
        step.init(placed, *data(0))


def test_a_loop_under_remat_over_a_tree_that_was_cast_before():
    """The step opens the checkpoint even if its inputs are computed from parameters."""
    found = MODELS["plain, remat loop"]()
    cast = lambda params: jax.tree.map(lambda w: (w * 1.0).astype(jnp.bfloat16), params)
    loss = lambda params, x, key: found.loss_fn(cast(params), x.astype(jnp.bfloat16), key)
    assert stacks_in(by_plan(fuse_lists(loss, adalomo(1e-2)), found.params)) == found.stacks
