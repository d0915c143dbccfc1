"""Values of two programs have the same term if they are the same function of the same inputs."""

import jax
import jax.numpy as jnp
import pytest

from adalomo_jax.fused.plan.jaxpr import trace
from adalomo_jax.fused.plan.terms import Terms

X, Y = jnp.ones(3), jnp.ones(2)


def terms_of(terms, fn, **inputs):
    """The terms of what ``fn`` returns, given inputs by name."""
    program, _ = trace(lambda xs: fn(*xs), list(inputs.values()))
    return terms.outputs(program, [terms.input(name) for name in inputs])


def loop(*xs, step=1.0):
    return jax.lax.fori_loop(0, 3, lambda i, xs: [x * 2 + step for x in xs], list(xs))


def while_loop(*xs, step=1.0):
    return jax.lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, [x + step for x in c[1]]), (0, list(xs)))[1]


def branch(*xs, step=1.0):
    return jax.lax.cond(jnp.pi > 3, lambda xs: [x * step for x in xs], lambda xs: xs, list(xs))


def custom(*xs, step=1.0):
    return [jax.checkpoint(lambda x: jax.nn.relu(x) * step)(x) for x in xs]


def nested(*xs, step=1.0):
    return jax.lax.scan(lambda xs, _: (loop(*xs, step=step), None), list(xs), length=2)[0]


each = pytest.mark.parametrize("fn", [loop, while_loop, branch, custom, nested])


@each
def test_what_a_value_does_not_depend_on_is_not_in_its_term(fn):
    terms = Terms()
    both, alone = terms_of(terms, fn, y=Y, x=X), terms_of(terms, fn, x=X)
    assert both[1] == alone[0] != both[0]
    assert terms.inputs_of(both[1]) == {"x"}


@each
def test_other_numbers_make_another_term(fn):
    terms = Terms()
    assert terms_of(terms, fn, x=X) != terms_of(terms, lambda x: fn(x, step=2.0), x=X)
    assert terms_of(terms, fn, x=X) != terms_of(terms, fn, y=X)


def test_what_is_carried_around_a_loop_is_followed():
    def rotate(x, y, z):
        return jax.lax.fori_loop(0, 3, lambda i, c: (c[1], c[2] * 2, c[2]), (x, y, z))

    terms = Terms()
    results = terms_of(terms, rotate, x=X, y=X, z=X)
    assert [terms.inputs_of(term) for term in results] == [{"x", "y", "z"}, {"y", "z"}, {"z"}]


def test_an_array_is_compared_by_its_numbers():
    terms = Terms()
    add = lambda n: lambda x: x + jnp.asarray([1.0, 2.0, n])
    assert terms_of(terms, add(3.0), x=X) == terms_of(terms, add(3.0), x=X) != terms_of(terms, add(4.0), x=X)
