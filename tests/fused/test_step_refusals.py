"""A step refuses losses, parameters, states and arguments that it cannot use, before it compiles anything."""

import jax.numpy as jnp
import pytest
from language_model import batch, init_params, make_loss
from small_model import small_loss, small_params

from adalomo_jax import adalomo, fuse, lomo

ERRORS = {
    "vector loss": (lambda p, x: p["w"] * x, {"w": jnp.ones(3)}, {}, "float scalar, but it is float32\\[3\\]"),
    "integer loss": (lambda p, x: jnp.int32(p["w"][0]), {"w": jnp.ones(3)}, {}, "float scalar, but it is int32"),
    "aux unsaid": (lambda p, x: (jnp.sum(p["w"]), x), {"w": jnp.ones(3)}, {}, "has_aux=True"),
    "no aux": (lambda p, x: jnp.sum(p["w"]), {"w": jnp.ones(3)}, {"has_aux": True}, "must return \\(loss, aux\\)"),
    "integers": (
        lambda p, x: jnp.sum(p["w"] * p["n"]),
        {"w": jnp.ones(3), "n": jnp.arange(3)},
        {"trainable": lambda path: True},
        "'n' is of int32",
    ),
    "complex": (lambda p, x: jnp.abs(p["w"][0]), {"w": jnp.ones(3, jnp.complex64)}, {}, "'w' is of complex64"),
    "nothing": (lambda p, x: jnp.sum(p["n"]) * 1.0, {"n": jnp.arange(3)}, {}, "Nothing is trained"),
    "part of a tree": (
        lambda p, x: jnp.sum(p["w"]) + jnp.sum(p["b"]),
        {"w": jnp.ones(3), "b": jnp.ones(3)},
        {"trainable": {"w": True}},
        "trainable must be a tree like params",
    ),
    "no array": (lambda p, x: jnp.sum(p["w"]), {"w": jnp.ones(3), "n": 1.0}, {}, "'n' is of the type float"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_refuses_before_compiling(case):
    loss_fn, params, options, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        fuse(loss_fn, adalomo(1e-2), **options).init(params, 1.0)


def test_refuses_parameters_or_arguments_unlike_those_of_init():
    step = fuse(make_loss(), adalomo(1e-2))
    params, tokens = init_params(4), batch()
    with pytest.raises(ValueError, match="'head' was absent in init, and is float32\\[16, 32\\] now"):
        step(params, step.init(init_params(4, tied=True), tokens), tokens)
    with pytest.raises(
        ValueError, match=r"'layers0/down' was float32\[3, 24, 16\] in init, and is float32\[4, 24, 16\]"
    ):
        step(params, step.init(init_params(3), tokens), tokens)
    with pytest.raises(ValueError, match=r"another structure than in init: args\[0\]\['mask'\] is present now"):
        loss_fn = lambda params, batch: make_loss()(params, batch["tokens"])
        step = fuse(loss_fn, lomo(1e-2))
        step(params, step.init(params, {"tokens": tokens}), {"tokens": tokens, "mask": tokens})


def test_refuses_a_state_that_is_not_its_own():
    params, tokens = small_params(), batch()
    step = fuse(small_loss, adalomo(1e-2))
    state = step.init(params, tokens)
    with pytest.raises(ValueError, match="not that of these parameters and this tx"):
        step(params, state._replace(inner=adalomo(1e-2).init({})), tokens)
    with pytest.raises(ValueError, match=r"has the shape \(3, .*\), but \(4, .*\) is due"):
        step(params, state._replace(inner=step.init(small_params(3), tokens).inner), tokens)
    with pytest.raises(ValueError, match="must be what step.init returns"):
        step(params, state.inner, tokens)


def test_refuses_arrays_that_a_step_has_used():
    params, tokens = small_params(), batch()
    step = fuse(small_loss, adalomo(1e-2))
    state = step.init(params, tokens)
    result = step.jit(params, state, tokens)
    with pytest.raises(ValueError, match=r"params\['embed'\] was given to an earlier step"):
        step.jit(params, result.state, tokens)
    with pytest.raises(ValueError, match="state.count was given to an earlier step"):
        step.jit(result.params, state, tokens)
    with pytest.raises(ValueError, match=r"params\['embed'\] was given to an earlier step"):
        step.init(params, tokens)
