"""The estimate, and the walk that it rests on."""

import jax
import jax.numpy as jnp
import pytest
from on_targets import memory_rows, needs_cuda, needs_libtpu
from traced import ARRAY, SQUARE, STACK, N, temporaries, tpu

from adalomo_jax import adalomo, fuse
from adalomo_jax.memory import TARGETS, compile_usage, estimate_usage
from adalomo_jax.memory.placement import Chip
from adalomo_jax.memory.tiles import lies_transposed, row_major_bytes, tiled_bytes


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


def two_loops(second, begun):
    """The first needs two squares inside, the second none."""

    def fn(xs):
        first = jax.lax.scan(lambda total, x: (total + jnp.sum((x @ x) @ x), None), 0.0, xs)[0]
        return first, jax.lax.scan(second, begun(), xs)

    return lambda platform: temporaries(fn, STACK, chip=Chip(platform))


def test_a_gpu_makes_what_loops_collect_into_before_the_first_of_them():
    accumulates = two_loops(lambda total, x: (total + x, None), lambda: jnp.zeros(SQUARE))
    collects = two_loops(lambda _, x: (0.0, x * 2), lambda: 0.0)
    assert accumulates("cuda") == accumulates("cpu")
    assert ARRAY < collects("cuda") - collects("cpu") <= 2 * ARRAY


def test_a_loop_reads_a_transpose_as_it_lies_but_on_a_tpu():
    def extra(platform):
        multiply = lambda w, xs: jax.lax.scan(lambda total, x: (total + jnp.sum(x @ w), None), 0.0, xs)[0]
        transposed, plain = (lambda w, xs: multiply(w.T, xs)), multiply
        chip = Chip(platform)
        return temporaries(transposed, SQUARE, STACK, chip=chip) - temporaries(plain, SQUARE, STACK, chip=chip)

    assert extra("cuda") == 0 and extra("tpu") == ARRAY


def test_of_branches_by_platform_one_is_taken():
    branches = lambda x: jax.lax.platform_dependent(x, cpu=lambda x: (x @ x) @ x, default=lambda x: x * 2)
    on = lambda platform: temporaries(lambda x: jnp.sum(branches(x)), SQUARE, chip=Chip(platform))
    assert on("cpu") == 2 * ARRAY and on("cuda") == 4


def test_a_tpus_matmul_adds_to_what_it_is_written_over():
    def extra(fn, platform="tpu"):
        return temporaries(fn, SQUARE, SQUARE, in_place={0: 0}.items(), chip=Chip(platform))

    assert extra(lambda total, x: total + x @ x) == 0
    assert extra(lambda total, x: total + x @ x, "cuda") == ARRAY
    assert extra(lambda total, x: total + total @ x) == ARRAY
    assert extra(lambda total, x: (total + (y := x @ x), jnp.sum(y))) >= ARRAY


def multiply_and_write(stack, x):
    layer = lambda x, w: (x @ w, None)
    carried = lambda i, both: (both[0].at[i].set(both[0][i] @ both[1]), both[1])
    return jax.lax.scan(layer, x, stack)[0], jax.lax.scan(lambda c, i: (carried(i, c), None), (stack, x), jnp.arange(8))


def test_an_input_that_lies_transposed_is_copied_where_a_loop_with_matmuls_carries_it():
    layers, copy = (8, N, N), 10**7
    read = lambda stack, x: jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0]
    assert temporaries(read, layers, SQUARE, copied={0: copy}) == temporaries(read, layers, SQUARE) < copy
    assert temporaries(multiply_and_write, layers, SQUARE, copied={0: copy}) >= copy
    assert temporaries(lambda table, i: table[i.astype(int)] * 2, SQUARE, (3,), copied={0: copy}) >= copy


def test_such_an_input_is_its_own_transpose():
    whole = lambda table: jnp.sort(table.T)
    assert temporaries(whole, SQUARE) - temporaries(whole, SQUARE, copied={0: 10**7}) == ARRAY


def test_a_broadcast_constant_is_made_in_a_tpus_loop():
    def masked(xs):
        zeros = jnp.zeros(SQUARE)
        return jax.lax.scan(lambda total, x: (total + jnp.sum(jnp.where(x > 0, x, zeros)), None), 0.0, xs)[0]

    assert temporaries(masked, (8, N, N)) - temporaries(masked, (8, N, N), chip=tpu(0)) >= ARRAY


def test_tiles():
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    assert tiled_bytes(array(49152, 576)) == 49152 * 576 * 2 and lies_transposed(array(49152, 576))
    assert row_major_bytes(array(49152, 576)) == 49152 * 640 * 2
    assert tiled_bytes(array(30, 576, 576)) == 30 * 576 * 640 * 2 and not lies_transposed(array(30, 576, 576))
    assert tiled_bytes(array(32, 4096, 4096)) == 32 * 4096 * 4096 * 2
    assert tiled_bytes(array(30, 576, dtype=jnp.float32)) == 32 * 640 * 4
    assert tiled_bytes(array(dtype=jnp.int32)) == 128 * 4
    assert tiled_bytes(array(4, 128)) == 4 * 128 * 2 and tiled_bytes(array(3, 130)) == 4 * 256 * 2
    assert tiled_bytes(array(128)) == 256 * 2 and tiled_bytes(array(384, dtype=jnp.float32)) == 512 * 4
    assert tiled_bytes(array(1025, dtype=jnp.float32)) == 2048 * 4


@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
@pytest.mark.parametrize("model, seq_len", [("tiny", 512), ("smollm2-135m", 512), ("smollm2-135m", 2048)])
@pytest.mark.parametrize(
    "device",
    [
        *(pytest.param(device, marks=needs_libtpu) for device in ("tpu-v5e", "tpu-v5p", "tpu-v6e")),
        *(pytest.param(device, marks=needs_cuda) for device in ("h100", "rtx-4090")),
    ],
)
def test_an_estimate_of_a_small_preset_is_within_a_tenth(device, model, seq_len, fused):
    options = ["--model", model, "--seq-len", str(seq_len), "--device", device, fused]
    (compiled,), (estimated,) = (memory_rows(*options, *more).values() for more in ([], ["--estimate"]))
    assert estimated["estimated"] and not compiled["estimated"]
    assert estimated["peak_bytes"] == pytest.approx(compiled["peak_bytes"], rel=0.1)
    assert estimated["argument_bytes"] == pytest.approx(compiled["argument_bytes"], rel=1e-4)


@pytest.mark.uncached
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
