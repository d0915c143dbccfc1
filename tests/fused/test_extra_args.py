"""`tx.update` gets the loss as `value`, and the arguments that the step gets by name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import RELATIVE_ERROR, relative_error

from adalomo_jax import fuse
from adalomo_jax.linen import TrainState

X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)


def params():
    rng = np.random.default_rng(1)
    shapes = {"layers": (2, 3, 3), "head": (3, 2)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def loss_fn(params, x):
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["layers"])
    return jnp.mean((x @ params["head"]) ** 2)


def scaled_by(*names):
    """Plain descent whose rate is the sum of the extra arguments that are given; it keeps the last rate."""

    def update(updates, state, params=None, **extra_args):
        rate = sum(0.01 * extra_args.get(name, 0.0) for name in names)
        return jax.tree.map(lambda g: -rate * g, updates), jnp.asarray(rate, jnp.float32)

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros([]), update)


def demands_scale():
    def update(updates, state, params=None, *, scale, **extra_args):
        return jax.tree.map(lambda g: -scale * g, updates), state

    untyped: Any = update  # Optax's types do not know required arguments
    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), untyped)


def plain(rate):
    """One step of descent, at a rate that depends on the loss."""
    loss, grads = jax.value_and_grad(loss_fn)(params(), X)
    return jax.tree.map(lambda p, g: p - rate(loss) * g, params(), grads), loss


OPTIONS = {
    "as it is": {},
    "microbatches": {"microbatches": 2},
    "clipped, with a loss scale": {"max_grad_norm": 1e6, "loss_scale": 128.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_value_is_the_loss_of_the_whole_batch_unscaled(options):
    step = fuse(loss_fn, scaled_by("value"), **options)
    state = step.init(params(), X)
    expected, loss = plain(lambda loss: 0.01 * loss)
    for run in (jax.jit(step), step.unfused):
        result = run(params(), state, X)
        assert relative_error(result.params, expected) < RELATIVE_ERROR
        assert relative_error(result.state.inner, 0.01 * loss) < RELATIVE_ERROR


def test_what_is_given_by_name_goes_to_update_and_replaces_the_loss():
    step = fuse(loss_fn, scaled_by("value", "more"))
    expected, _ = plain(lambda loss: 0.01 * (2.0 + 3.0))
    for run in (step.jit, step.unfused):
        result = run(params(), step.init(params(), X), X, value=jnp.float32(2.0), more=3.0)
        assert relative_error(result.params, expected) < RELATIVE_ERROR


def test_the_linen_state_passes_them_on():
    state = TrainState.create(X, loss_fn=loss_fn, params=params(), tx=demands_scale())
    state, _ = state.step(X, scale=0.5)
    expected, _ = plain(lambda loss: 0.5)
    assert relative_error(state.params, expected) < RELATIVE_ERROR


def test_a_missing_one_is_asked_for_in_the_step():
    step = fuse(loss_fn, demands_scale())
    state = step.init(params(), X)
    for run in (step, step.jit, step.unfused, step.jit.lower):
        with pytest.raises(ValueError, match=r"was not given 'scale'. Pass it by name"):
            run(params(), state, X)


def test_a_rule_that_mixes_leaves_is_refused_once_its_arguments_are_there():
    step = fuse(loss_fn, optax.chain(demands_scale(), optax.clip_by_global_norm(1.0)))
    state = step.init(params(), X)
    with pytest.raises(ValueError, match="tx mixes leaves"):
        step(params(), state, X, scale=1.0)


@pytest.mark.parametrize("extra_args, message", [
    ({"scale": lambda x: x}, r"must be trees of arrays, but \['scale'\] is of the type function"),
    ({"scale": "x"}, r"\['scale'\] is of the type str"),
    ({"scale": 1.0, "x": X}, "given by position, but 'x' was given by name"),
])  # fmt: skip
def test_what_update_cannot_be_given_is_refused(extra_args, message):
    step = fuse(loss_fn, demands_scale())
    state = step.init(params(), X)
    args = () if "x" in extra_args else (X,)
    for run in (step, step.jit, step.unfused):
        with pytest.raises(ValueError, match=message):
            run(params(), state, *args, **extra_args)
