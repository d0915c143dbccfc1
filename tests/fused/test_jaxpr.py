"""Programs read from jaxprs compute what the functions compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalomo_jax.fused.plan.contents import reads_in_order
from adalomo_jax.fused.plan.dependence import active_values
from adalomo_jax.fused.plan.jaxpr import evaluate, scan_of, trace

X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
TABLE = np.arange(4.0, dtype=np.float32)


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, d: (2 * d,))


def nested_jits(x):
    inner = jax.jit(lambda x: jnp.sin(x) + TABLE)
    return jax.jit(lambda x: inner(x) * inner(2 * x))(x)


def scan_in_scan(x):
    inner = lambda c, w: (c + w, c * w)
    return jax.lax.scan(lambda c, row: (jax.lax.scan(inner, c, row)[0], row), 0.0, x)


FUNCTIONS = {
    "arithmetic": lambda x: (x + 1) * x,
    "nested jits": nested_jits,
    "passed through": lambda x: (x, 3.0, x),
    "custom_vjp": doubled,
    "softmax": jax.nn.softmax,
    "scan in scan": scan_in_scan,
    "cond": lambda x: jax.lax.cond(jnp.sum(x) > 0, jnp.sin, jnp.cos, x),
    "while": lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 10, lambda x: x + 1, x),
    "random": lambda x: jax.random.normal(jax.random.key(0), x.shape) + x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_computes_the_function(name):
    program, treedef = trace(lambda leaves: FUNCTIONS[name](leaves[0]), [X])
    expected = FUNCTIONS[name](X)
    assert treedef == jax.tree.structure(expected)
    values = {**program.constants, program.inputs[0]: X}
    evaluate(program.equations, values)
    for actual, want in zip([values[v] for v in program.outputs], jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, want, rtol=1e-6)


def names(fn, *leaves):
    return [equation.name for equation in trace(lambda leaves: fn(*leaves), list(leaves))[0].equations]


def test_calls_are_opened_and_dead_equations_dropped():
    def fn(x):
        jnp.cos(x)
        return jax.jit(lambda x: jnp.sin(x))(x)

    assert names(fn, X) == ["sin"]


def test_effects_are_kept():
    def fn(x):
        jax.debug.callback(lambda x: None, x)
        return x

    assert len(names(fn, X)) == 1


def row_scan(x):
    return jax.lax.scan(lambda c, row: (c + jnp.sin(row), None), jnp.zeros(4), x)[0]


def test_a_checkpoint_is_opened_where_a_scan_runs_over_a_leaf():
    (checkpoint,) = names(jax.checkpoint(jnp.sin), X)
    assert names(jax.checkpoint(row_scan), X)[-1] == "scan"
    assert names(jax.checkpoint(jax.jit(jax.checkpoint(row_scan))), X)[-1] == "scan"
    assert names(jax.checkpoint(lambda x: row_scan(2 * x)), X) == [checkpoint]


def test_a_checkpoint_inside_the_body_is_kept():
    def fn(x):
        body = jax.checkpoint(lambda c, row: (row_scan(c[None] * row), None))
        return jax.lax.scan(body, jnp.zeros(4), x)[0]

    program, _ = trace(lambda leaves: fn(*leaves), [X])
    equation = program.equations[-1]
    scan = scan_of(equation)
    assert (scan.length, scan.num_carry, scan.reverse) == (3, 1, False)
    assert [inner.name for inner in scan.body.equations] == names(jax.checkpoint(jnp.sin), X)


def test_active_values_depend_on_a_leaf():
    def fn(leaves, y):
        carry, ys = jax.lax.scan(lambda c, row: ((c[0] + row, c[1] + 1.0), c[1]), (jnp.zeros(4), 0.0), leaves[0])
        return carry[0], carry[1], ys, jnp.sin(y), jnp.argmax(leaves[0])

    program, _ = trace(fn, [X], X)
    active = active_values(program, program.inputs[:1])
    assert [v in active for v in program.outputs] == [True, False, False, False, False]


def test_reads_are_in_order_of_the_program_also_within_calls():
    def fn(leaves, x):
        first, second, unread, fourth, third = leaves
        x = jax.checkpoint(lambda x, second, first: (x + first) * jax.jit(jnp.sin)(second))(x, second, first)
        return jax.lax.scan(lambda x, w: (x * w * fourth, None), x * third, first)[0]

    program, _ = trace(fn, [X] * 5, X)
    first, second, _, fourth, third, x = program.inputs
    assert reads_in_order(program) == [x, first, second, third, fourth]
