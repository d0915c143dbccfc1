"""The estimate, and the walk that it rests on."""

import jax
import jax.numpy as jnp
import pytest

from adalomo_jax import adalomo, fuse
from adalomo_jax.fused.jaxpr import trace
from adalomo_jax.memory import TARGETS, compile_usage, estimate_usage
from adalomo_jax.memory.liveness import temporary_bytes

N = 64
ARRAY = N * N * 4


def temporaries(fn, *shapes, in_place=()):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program, _ = trace(lambda leaves: fn(*leaves), arguments)
    return temporary_bytes(program, dict(in_place))


SQUARE = (N, N)


def test_what_is_elementwise_exists_in_its_reader_only():
    assert temporaries(lambda x: jnp.sum(jnp.tanh(x) * 2 + 1), SQUARE) == 4


def test_a_matmuls_operands_and_result_exist():
    assert temporaries(lambda x: jnp.sum(jnp.tanh(x) @ x), SQUARE) == 2 * ARRAY
    assert temporaries(lambda x: jnp.sum(x @ x), SQUARE) == ARRAY + 4


def test_a_buffer_is_freed_after_its_last_reader():
    chain = lambda x: jnp.sum(((x @ x) @ x) @ x)
    kept = lambda x: jnp.sum((y := x @ x) @ x @ x @ y)
    assert temporaries(chain, SQUARE) == 2 * ARRAY
    assert temporaries(kept, SQUARE) == 3 * ARRAY


def test_an_output_in_the_place_of_an_input_takes_no_memory():
    assert temporaries(lambda x: x * 2, SQUARE) == ARRAY
    assert temporaries(lambda x: x * 2, SQUARE, in_place={0: 0}.items()) == 0


def loop(stack, x):
    def body(i, stack):
        layer = jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(stack, layer + x, i, 0)

    return jax.lax.fori_loop(0, 8, body, stack)


def test_a_loop_carries_in_place_what_may_be_overwritten():
    layers = (8, N, N)
    assert temporaries(loop, layers, SQUARE, in_place={0: 0}.items()) < ARRAY
    assert temporaries(loop, layers, SQUARE) >= 8 * ARRAY


def test_what_a_scan_collects_exists_whole_and_its_body_once():
    collect = lambda xs, w: jnp.sum(jax.lax.scan(lambda c, x: (c, x @ w), 0.0, xs)[1])
    found = temporaries(collect, (8, N, N), SQUARE)
    assert 8 * ARRAY <= found <= 11 * ARRAY
    total = lambda xs, w: jax.lax.scan(lambda c, x: (c + jnp.sum(x @ w), None), 0.0, xs)[0]
    assert temporaries(total, (8, N, N), SQUARE) <= 3 * ARRAY


def test_a_branch_counts_as_the_larger():
    branch = lambda p, x: jax.lax.cond(p.sum() > 0, lambda x: jnp.sum(x @ x @ x), lambda x: x.sum(), x)
    assert 2 * ARRAY <= temporaries(branch, (1,), SQUARE) <= 2 * ARRAY + 64


@pytest.mark.parametrize("fused", [True, False])
def test_an_estimate_of_wide_layers_is_near_the_compiled_figure(fused):
    """On a CPU, in float32, with weights that are the most of it; presets on accelerators are compared where slow."""
    layers, dim = 12, 512
    params = {"layers": jax.ShapeDtypeStruct((layers, dim, dim), jnp.float32)}
    x = jax.ShapeDtypeStruct((8, dim), jnp.float32)

    @jax.checkpoint
    def layer(x, w):
        return x + jnp.tanh(x @ w), None

    step = fuse(lambda params, x: jnp.mean(jax.lax.scan(layer, x, params["layers"])[0] ** 2), adalomo(1e-2))
    estimated = estimate_usage(step, params, x, target=TARGETS["cpu"], fused=fused)
    compiled = compile_usage(step, params, x, target=TARGETS["cpu"], fused=fused)
    assert estimated.estimated and estimated.peak_bytes == pytest.approx(compiled.peak_bytes, rel=0.2)
    for exact in ("params_bytes", "state_bytes", "gradient_bytes", "saved_bytes", "argument_bytes"):
        assert getattr(estimated, exact) == getattr(compiled, exact)
