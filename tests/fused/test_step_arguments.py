"""A step refuses arguments that it knows to be wrong, before anything is compiled, in one line."""

import jax
import jax.numpy as jnp
import pytest

from adalomo_jax import fuse, lomo

X = jnp.ones((2, 4))
PARAMS = {"head": jnp.ones((4, 1)), "layers": 0.1 * jnp.ones((3, 4, 4))}


def loss_fn(params, x, *_):
    h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]
    return jnp.mean(h @ params["head"])


NO_ARRAYS = {
    "a string": ("mean", "argument 2 of loss_fn is 'mean', of the type str"),
    "a function": ({"f": jnp.tanh}, r"argument 2 of loss_fn\['f'\] is the function tanh, of the type"),
    "an object": ([1, object()], r"argument 2 of loss_fn\[1\] is <object .*>, of the type object"),
}


@pytest.mark.parametrize("case", NO_ARRAYS)
def test_refuses_an_argument_that_is_no_array(case):
    value, message = NO_ARRAYS[case]
    with pytest.raises(ValueError, match=f"^The arguments of loss_fn must be arrays, but {message}.*. Close over it"):
        fuse(loss_fn, lomo(1e-2)).init(PARAMS, X, value)


def test_takes_what_jax_takes_as_arrays():
    step = fuse(loss_fn, lomo(1e-2))
    args = (X, None, 1, True, 0.5, 1j, jax.random.key(0), jax.ShapeDtypeStruct((2,), jnp.int8), {"a": ()})
    step.init(PARAMS, *args)


RETURNED = {
    "a string as the loss": (lambda p, x: "loss", {}, "it is 'loss', of the type str"),
    "a string beside it": (
        lambda p, x: (loss_fn(p, x), {"n": "a"}),
        {"has_aux": True},
        r"its leaf .*'n'\] is 'a'",
    ),
    "a function": (lambda p, x: (loss_fn(p, x), loss_fn), {"has_aux": True}, r"its leaf \[1\] is the function"),
}


@pytest.mark.parametrize("case", RETURNED)
def test_refuses_what_the_loss_returns_that_is_no_array(case):
    fn, options, message = RETURNED[case]
    with pytest.raises(ValueError, match=f"^What loss_fn returns must be arrays, but {message}"):
        fuse(fn, lomo(1e-2), **options).init(PARAMS, X)


@pytest.mark.parametrize("answer", ["layers", None, 1])
def test_refuses_a_trainable_that_answers_no_bool(answer):
    with pytest.raises(ValueError, match="^trainable must return True or False of a path, but of 'head' it returned"):
        fuse(loss_fn, lomo(1e-2), trainable=lambda path: answer).init(PARAMS, X)


@pytest.mark.parametrize("argnums", [(1, 7), 2])
def test_refuses_to_slice_arguments_that_are_not_there(argnums):
    step = fuse(loss_fn, lomo(1e-2), microbatches=2, batch_argnums=argnums)
    with pytest.raises(ValueError, match="^batch_argnums names argument [72] of loss_fn, .* with 1 after them"):
        step.init(PARAMS, X)


@pytest.mark.parametrize("state", [None, (), {"count": 0}])
@pytest.mark.parametrize("call", ["jit", "__call__", "unfused"])
def test_refuses_what_is_no_state(call, state):
    step = fuse(loss_fn, lomo(1e-2))
    with pytest.raises(ValueError, match="^The state must be what step.init returns, but it is of the type"):
        getattr(step, call)(PARAMS, state, X)


@pytest.mark.parametrize("call", ["jit", "__call__", "unfused", "init", "plan", "place", "abstract_state"])
def test_refuses_parameters_that_a_step_has_used(call):
    step, params = fuse(loss_fn, lomo(1e-2)), jax.tree.map(jnp.copy, PARAMS)
    state = step.init(params, X)
    used = jax.tree.map(jnp.copy, params)
    jax.tree.map(lambda x: x.delete(), used)
    args = (used, state, X) if call in ("jit", "__call__", "unfused") else (used, X)
    with pytest.raises(ValueError, match=r"^params\['head'\] was given to an earlier step"):
        getattr(step, call)(*args)
