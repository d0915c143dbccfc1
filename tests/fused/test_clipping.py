"""`max_grad_norm` clips by the global norm like Optax, by a second backward pass instead of a tree of gradients."""

import functools

import apart
import flops
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import RELATIVE_ERROR, RULES, relative_error, run_both
from compiled import memory_of, tree_bytes
from language_model import REMATS, batch, init_params, layer, make_loss
from tiers import always, slow

from adalomo_jax import adalomo, fuse

BATCHES = [(batch(i),) for i in range(4)]
LOW, BETWEEN, HIGH = 0.5, 3.1, 100.0
"""Thresholds below, among and above the gradient norms of the small model's first steps."""
DIM, HIDDEN = 64, 128
TOKENS = {"scanned": (2, 32), "unrolled": (1, 4)}
"""Batch and length. Unrolled layers get few tokens: XLA's CPU compiler (of JAX 0.10) drops the barriers of remat,
recomputes the layers in the forward pass and keeps the results, which must not hide the gradients."""
DEPTHS = {"scanned": (4, 16), "unrolled": (2, 6)}


def norms_without_clipping(params):
    return apart.train(make_loss(), optax.sgd(0.0), params, BATCHES)[2]


@pytest.mark.parametrize(
    ("rule", "most"),
    [("lomo", LOW), ("adalomo", BETWEEN), slow("adamw", LOW), slow("lomo", BETWEEN), slow("lomo", HIGH)],
)
def test_equals_optax_on_the_layers_apart(rule, most):
    params, tx = init_params(3), RULES[rule]
    results = apart.run_fused(fuse(make_loss(), tx, max_grad_norm=most), params, BATCHES)
    chained = optax.chain(optax.clip_by_global_norm(most), tx)
    expected, _, norms = apart.train(make_loss(), chained, params, BATCHES)
    assert relative_error(results[-1].params, expected) < RELATIVE_ERROR
    np.testing.assert_allclose(apart.norms_of(results), norms, rtol=1e-5)  # of the gradient before clipping


def test_the_thresholds_clip_always_sometimes_and_never():
    norms = norms_without_clipping(init_params(3))
    assert LOW < min(norms) < BETWEEN < max(norms) < HIGH


@pytest.mark.parametrize("most", [LOW, BETWEEN, slow(HIGH)])
def test_the_comparison_sees_whether_it_was_clipped(most):
    """If the step clips, and only then, another threshold gives another result."""
    params, tx = init_params(3), optax.sgd(0.1)
    clipped, other = (
        apart.train(make_loss(), optax.chain(optax.clip_by_global_norm(m), tx), params, BATCHES)[0]
        for m in (most, 0.9 * most)
    )
    error = relative_error(clipped, other)
    assert error == 0.0 if most == HIGH else error > 10 * RELATIVE_ERROR


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "remat"), [("adalomo", "remat"), ("adamw", "no remat"), ("sgd with momentum", "dots saved")]
)
def test_equals_the_unfused_step(rule, remat):
    params = init_params([3, 2], tied=True)
    fused, unfused = run_both(make_loss(remat), RULES[rule], params, BATCHES, max_grad_norm=LOW)
    assert relative_error(fused, unfused) < RELATIVE_ERROR


def test_the_norm_is_of_all_parameters():
    """It covers whole parameters and stacks; parameters that the loss does not read add nothing."""
    params = init_params(3) | {"unread": jnp.ones(3)}
    result = apart.run_fused(fuse(make_loss(), adalomo(1e-2), max_grad_norm=1.0), params, BATCHES[:1])[0]
    grads = jax.jit(jax.grad(make_loss()))(params, *BATCHES[0])
    np.testing.assert_allclose(result.metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    for name in ("embed", "head", "layers0"):
        assert float(optax.tree.norm(grads | {name: None})) < 0.99 * float(result.metrics["grad_norm"])


def trunk(remat):
    """The language model without its last norm and head."""

    def run(params, tokens):
        body = REMATS[remat](lambda x, w: (layer(x, w), None))
        return jax.lax.scan(body, params["embed"][tokens], params["layers0"])[0]

    return run


def backward_flops(fn, params, *args):
    def forward_and_back(params):
        y, pullback = jax.vjp(lambda p: fn(p, *args), params)
        return pullback(y)

    return flops.count(forward_and_back, params) - flops.count(fn, params, *args)


def added_flops(loss_fn, params, *args, **options):
    """The FLOPs of matrix multiplications that clipping adds."""
    counts = []
    for most in (None, 1.0):
        step = fuse(loss_fn, RULES["lomo"], max_grad_norm=most, **options)
        counts.append(flops.count(step, params, step.init(params, *args), *args))
    return counts[1] - counts[0]


@pytest.mark.parametrize("remat", always(REMATS, ["no remat", "remat"]))
def test_costs_one_backward_pass_over_the_saved_forward_pass(remat):
    """The head is pulled back right after its forward pass, for both passes at once."""
    params, tokens = init_params(4), batch()
    expected = backward_flops(trunk(remat), {"embed": params["embed"], "layers0": params["layers0"]}, tokens)
    assert added_flops(make_loss(remat), params, tokens) == expected > 0
    head = 2 * 2 * tokens.size * params["head"].size
    assert backward_flops(make_loss(remat), params, tokens) == expected + head


def test_the_count_sees_a_second_forward_pass():
    params, tokens = init_params(4), batch()
    costs = [backward_flops(trunk(remat), params, tokens) for remat in ("no remat", "remat")]
    # Of each layer's three matrix multiplications, the backward pass needs the last one's inputs, but not its result.
    again = 4 * 2 * tokens.size * (params["layers0"]["mix"][0].size + params["layers0"]["up"][0].size)
    assert costs[1] - costs[0] == again


def a_model(layers, form, tokens):
    params = init_params(layers, dim=DIM, hidden=HIDDEN)
    batch_size, length = TOKENS[tokens or form]
    tokens = batch(batch_size=batch_size, length=length)
    if form == "scanned":
        return make_loss(), params, tokens
    return apart.unrolled_loss, apart.unstack(params), tokens


@functools.cache
def temporaries(layers, form, rule="lomo", *, tokens=None, unfused=False, **options):
    loss_fn, params, tokens = a_model(layers, form, tokens)
    step = fuse(loss_fn, RULES[rule], **options)
    jitted = jax.jit(step.unfused, donate_argnums=(0, 1)) if unfused else step.jit
    return memory_of(jitted.lower(params, step.init(params, tokens), tokens).compile()).temp_size_in_bytes


LAYER_WEIGHTS = 4 * (DIM + DIM * DIM + 2 * DIM * HIDDEN)


def added_by_layers(form, *args, **options):
    """The temporaries that a deep model's additional layers add to a shallow one's, and the number of these layers."""
    few, many = DEPTHS[form]
    return temporaries(many, form, *args, **options) - temporaries(few, form, *args, **options), many - few


@pytest.mark.uncached
@pytest.mark.parametrize(("rule", "most"), [("lomo", 1.0), slow("adamw", None), slow("lomo", None), slow("adamw", 1.0)])
def test_no_gradient_tree_where_layers_are_scanned(rule, most):
    added, layers = added_by_layers("scanned", rule, max_grad_norm=most)
    batch_size, length = TOKENS["scanned"]
    assert added <= 1.1 * layers * batch_size * length * DIM * 4 < layers * LAYER_WEIGHTS / 4


@pytest.mark.slow
@pytest.mark.uncached
@pytest.mark.parametrize("most", [None, 1.0])
def test_no_gradient_tree_where_layers_are_unrolled(most):
    """Neither pass has one: XLA does not merge the passes, and neither keeps its results until the other has run."""
    added, layers = added_by_layers("unrolled", max_grad_norm=most)
    assert added <= layers * LAYER_WEIGHTS / 4


@pytest.mark.uncached
@pytest.mark.parametrize("most", [slow(None), slow(1.0)])
def test_unrolled_layers_save_their_inputs_only(most):
    added, layers = added_by_layers("unrolled", tokens="scanned", max_grad_norm=most)
    batch_size, length = TOKENS["scanned"]
    assert added <= 1.1 * layers * batch_size * length * DIM * 4


@pytest.mark.uncached
@pytest.mark.parametrize("form", ["scanned", slow("unrolled")])
def test_clipping_takes_no_more_than_the_gradients_of_the_ends(form):
    """The ends are pulled back once for both passes, and their gradients are kept from one to the other."""
    layers = DEPTHS[form][1]
    _, params, _ = a_model(layers, form, None)
    without, clipping = (temporaries(layers, form, "lomo", max_grad_norm=most) for most in (None, 1.0))
    assert clipping - without <= tree_bytes([params["head"], params["embed"]])


@pytest.mark.uncached
@pytest.mark.parametrize("form", ["scanned", slow("unrolled")])
def test_the_unfused_step_does_have_a_gradient_tree(form):
    added, layers = added_by_layers(form, max_grad_norm=1.0, unfused=True)
    assert added > layers * LAYER_WEIGHTS
