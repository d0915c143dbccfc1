"""The estimate is a lower bound of the figure that the compilers report."""

import jax
import jax.numpy as jnp
import pytest
from on_targets import memory_rows, needs_cuda, needs_libtpu

from adalomo_jax import adalomo, fuse
from adalomo_jax.memory import TARGETS, compile_usage, estimate_usage
from adalomo_jax.memory.tables import verdict

LAYERS, DIM = 12, 512
PARAMS = {"layers": jax.ShapeDtypeStruct((LAYERS, DIM, DIM), jnp.float32)}


@jax.checkpoint
def layer(x, w):
    return x + jnp.tanh(x @ w), None


def loss_fn(params, x):
    return jnp.mean(jax.lax.scan(layer, x, params["layers"])[0] ** 2)


def batch(rows):
    return jax.ShapeDtypeStruct((rows, DIM), jnp.float32)


def test_a_bound_has_arguments_and_the_larger_of_gradients_and_saved_inputs():
    step, matrix, row = fuse(loss_fn, adalomo(1e-2)), 4 * DIM * DIM, 4 * DIM
    of = lambda rows, **how: estimate_usage(step, PARAMS, batch(rows), target=TARGETS["h100"], **how)
    temporary = lambda usage: usage.peak_bytes - usage.argument_bytes
    assert temporary(of(8)) == of(8).gradient_bytes == matrix
    assert temporary(of(8, fused=False)) == LAYERS * matrix
    assert temporary(of(4096)) == of(4096).saved_bytes >= LAYERS * 4096 * row
    assert (of(8).argument_bytes or 0) >= LAYERS * matrix + of(8).state_bytes + 8 * row


def test_a_tpus_vector_memory_is_not_counted():
    step = fuse(loss_fn, adalomo(1e-2))
    on_a_tpu = lambda rows: estimate_usage(step, PARAMS, batch(rows), target=TARGETS["tpu-v5e"])
    assert on_a_tpu(8).temp_bytes == 0
    assert on_a_tpu(2**15).temp_bytes == on_a_tpu(2**15).saved_bytes - 2**27 > 0


def test_what_a_bound_does_not_rule_out_may_fit():
    usage = estimate_usage(fuse(loss_fn, adalomo(1e-2)), PARAMS, batch(8), target=TARGETS["h100"])
    assert usage.fits and verdict(usage) == "perhaps"


@pytest.mark.uncached
@pytest.mark.parametrize("fused", [True, False])
def test_a_bound_is_below_the_compiled_figure(fused):
    """This holds on a CPU; slow tests compare presets on accelerators."""
    step = fuse(loss_fn, adalomo(1e-2))
    estimated = estimate_usage(step, PARAMS, batch(8), target=TARGETS["cpu"], fused=fused)
    compiled = compile_usage(step, PARAMS, batch(8), target=TARGETS["cpu"], fused=fused)
    assert 0.8 * compiled.peak_bytes < estimated.peak_bytes <= compiled.peak_bytes
    for exact in ("params_bytes", "state_bytes", "gradient_bytes", "saved_bytes", "argument_bytes"):
        assert getattr(estimated, exact) == getattr(compiled, exact)


@pytest.mark.parametrize("more", [[], ["--no-fused"], ["--optimizer", "lomo"], ["--optimizer", "adamw"]], ids=" ".join)
@pytest.mark.parametrize("model, seq_len", [("tiny", 512), ("tiny", 2048), ("smollm2-135m", 2048)])
@pytest.mark.parametrize(
    "device",
    [
        *(pytest.param(device, marks=needs_libtpu) for device in ("tpu-v5e", "tpu-v5p", "tpu-v6e")),
        *(pytest.param(device, marks=needs_cuda) for device in ("h100", "rtx-4090")),
    ],
)
def test_a_bound_of_a_small_preset_is_below_the_compiled_figure(device, model, seq_len, more):
    options = ["--model", model, "--seq-len", str(seq_len), "--device", device, *more]
    (compiled,), (estimated,) = (memory_rows(*options, *how).values() for how in ([], ["--estimate"]))
    assert estimated["estimated"] and not compiled["estimated"]
    assert estimated["peak_bytes"] <= compiled["peak_bytes"]
