"""Origins tell which results of a function are unchanged inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from adalomo_jax.fused.plan.contents import has_programs
from adalomo_jax.fused.plan.jaxpr import Equation
from adalomo_jax.fused.plan.origins import call_with_origins

W, X = jnp.arange(27.0).reshape(3, 3, 3) / 9, jnp.ones(3)


def scan(f, axis=0):
    """A scan over layers that returns them too, as `nnx.scan` does."""

    def over_layers(w, x):
        x, w = lax.scan(f, x, jnp.moveaxis(w, axis, 0))
        return jnp.moveaxis(w, 0, axis), x

    return over_layers


def layer(x, w):
    return jnp.tanh(x @ w), w


def written(x, w):
    return jnp.tanh(x @ w), w / 2


def looped(w, x):
    w, x = lax.fori_loop(0, 2, lambda i, c: (c[0], c[1] + c[0][0, 0]), (w, x))
    return w, x


SAME = {
    "as it is": lambda w, x: (w, x + 1),
    "jit": jax.jit(lambda w, x: (w, x + 1)),
    "checkpoint": jax.checkpoint(lambda w, x: (w, jnp.sin(x))),
    "scan": scan(layer),
    "scan over checkpoints": scan(jax.checkpoint(layer)),
    "layers on another axis": scan(jax.checkpoint(layer), axis=2),
    "checkpoint of a scan": jax.checkpoint(scan(jax.jit(layer))),
    "carried": looped,
    "carried through a checkpoint": lambda w, x: lax.scan(
        lambda c, _: (jax.checkpoint(looped)(*c), None), (w, x), None, 2
    )[0],
}
WRITTEN = {
    "div": lambda w, x: (w / 2, x),
    "a constant": lambda w, x: (jnp.zeros_like(w), x),
    "another input": lambda w, x: (x, w),
    "transposed": lambda w, x: (w.swapaxes(1, 2), x),
    "in a checkpoint": jax.checkpoint(lambda w, x: (w * 2, x)),
    "in a scan": scan(jax.checkpoint(written)),
    "a layer put on another axis": lambda w, x: (scan(layer)(w, x)[0].swapaxes(1, 2), x),
    "a constant of a scan": lambda w, x: lax.scan(lambda x, _: (x, w[0]), x, None, 2)[::-1],
    "swapped in a carry": lambda w, x: (lax.scan(lambda c, _: (c[::-1], None), (w, w + 1), None, 2)[0][0], x),
}


def origin(fn):
    found = []

    def traced(w, x):
        result, origins = call_with_origins(fn, w, x)
        found.extend(origins)
        return result

    for ours, theirs in zip(jax.jit(traced)(W, X), fn(W, X), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    return found[0]


@pytest.mark.parametrize("fn", SAME.values(), ids=SAME)
def test_an_input_that_is_handed_on(fn):
    assert origin(fn) == 0


@pytest.mark.parametrize("fn", WRITTEN.values(), ids=WRITTEN)
def test_a_value_that_is_made(fn):
    found = origin(fn)
    assert found != 0 and not (isinstance(found, Equation) and has_programs(found) and found.name != "scan")


def test_what_a_cond_gives_is_not_known():
    found = origin(lambda w, x: lax.cond(x[0] > 0, lambda w: (w * 2, x), lambda w: (w, x), w))
    assert isinstance(found, Equation) and has_programs(found)
