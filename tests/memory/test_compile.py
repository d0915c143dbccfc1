"""``compile_usage`` turns what the compiler for this machine's CPU says about a step into figures."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from adalomo_jax import adalomo, fuse
from adalomo_jax.memory import TARGETS, compile_usage, estimate_usage
from adalomo_jax.memory.compile import needed_bytes

pytestmark = pytest.mark.uncached
CPU = TARGETS["cpu"]
LAYERS, DIM, BATCH = 12, 128, 8
STACK = LAYERS * DIM * DIM * 4
HEAD = DIM * 2 * 4


def loss_fn(params, x):
    @jax.checkpoint
    def layer(x, w):
        return x + jnp.tanh(x @ w), None

    return jnp.mean((jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]) ** 2)


@pytest.fixture
def params():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    return {"layers": shape(LAYERS, DIM, DIM), "head": shape(DIM, 2)}


@pytest.fixture
def x():
    return jax.ShapeDtypeStruct((BATCH, DIM), jnp.float32)


def test_the_fused_step_of_any_loss_and_transformation(params, x):
    usage = compile_usage(fuse(loss_fn, optax.adamw(1e-3)), params, x, target=CPU)
    assert usage.params_bytes == STACK + HEAD
    moments = 2 * usage.params_bytes
    assert moments <= usage.state_bytes <= moments + 1000
    assert usage.gradient_bytes == STACK // LAYERS > HEAD
    assert usage.saved_bytes == LAYERS * BATCH * DIM * 4
    assert usage.argument_bytes is not None and usage.alias_bytes is not None and usage.temp_bytes is not None
    assert usage.argument_bytes == usage.params_bytes + usage.state_bytes + BATCH * DIM * 4
    assert usage.alias_bytes == usage.params_bytes + usage.state_bytes
    assert 0 < usage.peak_bytes - usage.argument_bytes - usage.temp_bytes < 1000
    assert usage.fits and usage.spare_bytes == CPU.limit_bytes - usage.peak_bytes
    assert usage.compile_seconds > 0 and not usage.estimated and not usage.refused


def test_all_gradients_are_alive_in_the_unfused_step(params, x):
    step = fuse(loss_fn, adalomo(1e-2))
    fused, unfused = (compile_usage(step, params, x, target=CPU, fused=fused) for fused in (True, False))
    assert unfused.gradient_bytes == STACK + HEAD
    assert unfused.saved_bytes == fused.saved_bytes
    assert unfused.peak_bytes - fused.peak_bytes > 0.9 * STACK


def test_frozen_parameters_have_no_gradients(params, x):
    step = fuse(loss_fn, adalomo(1e-2), trainable=lambda path: path == "head")
    usage = compile_usage(step, params, x, target=CPU, fused=False)
    assert usage.gradient_bytes == HEAD and usage.params_bytes == STACK + HEAD


def test_arrays_may_be_given_and_are_not_consumed(params, x):
    step = fuse(loss_fn, adalomo(1e-2))
    ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), (params, x))
    usage = compile_usage(step, ones[0], ones[1], target=CPU)
    assert usage.peak_bytes == compile_usage(step, params, x, target=CPU).peak_bytes
    assert not any(array.is_deleted() for array in jax.tree.leaves(ones))


def test_bytes_are_of_one_chip(params, x):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    on = lambda s, *spec: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    sharded = {"layers": on(params["layers"], None, "fsdp"), "head": on(params["head"])}
    step = fuse(loss_fn, adalomo(1e-2))
    usage = compile_usage(step, sharded, on(x, "fsdp"), target=CPU)
    assert usage.params_bytes == STACK // 8 + HEAD
    assert usage.gradient_bytes == STACK // LAYERS // 8 > HEAD
    assert usage.saved_bytes == LAYERS * (BATCH // 8) * DIM * 4
    assert usage.limit_bytes == CPU.limit_bytes // 8
    assert usage.alias_bytes is not None and usage.alias_bytes >= usage.params_bytes


def refusing(message):
    class Refusing:
        def compile(self):
            raise jax.errors.JaxRuntimeError(message)

    return Refusing()


OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (26.96G) exceeds available HBM (15.75G). HLO module: jit_unfused."
)


def test_what_is_refused_for_lack_of_memory_does_not_fit(params, x, monkeypatch):
    step = fuse(loss_fn, adalomo(1e-2))
    monkeypatch.setattr(type(step.jit), "lower", lambda *args: refusing(OUT_OF_MEMORY))
    usage = compile_usage(step, params, x, target=TARGETS["cpu"])
    assert usage.refused and not usage.fits
    assert usage.peak_bytes == round(26.96 * 2**30)
    assert usage.params_bytes == STACK + HEAD and usage.temp_bytes is None


def test_another_error_is_not_taken_for_lack_of_memory(params, x, monkeypatch):
    step = fuse(loss_fn, adalomo(1e-2))
    monkeypatch.setattr(type(step.jit), "lower", lambda *args: refusing("INTERNAL: Used 26.80G of 15.75G hbm."))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_usage(step, params, x, target=TARGETS["cpu"])


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (OUT_OF_MEMORY, round(26.96 * 2**30)),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 26.80G of 15.75G hbm.", round(26.8 * 2**30)),
        ("RESOURCE_EXHAUSTED: (900.5M) exceeds available HBM (512.00M)", round(900.5 * 2**20)),
        ("RESOURCE_EXHAUSTED: (12K) exceeds available", 12 * 2**10),
        ("RESOURCE_EXHAUSTED: too many open files", None),
        ("UNIMPLEMENTED: (26.96G) exceeds available HBM", None),
    ],
)
def test_the_size_that_a_refusal_names(message, size):
    assert needed_bytes(message) == size


@pytest.mark.parametrize("usage_of", [compile_usage, estimate_usage])
def test_a_key_among_the_arguments(params, x, usage_of):
    """The bytes of a key, such as dropout's, are counted."""
    of_key = lambda params, x, key: loss_fn(params, x + jax.random.normal(key, x.shape))
    usage = usage_of(fuse(of_key, adalomo(1e-2)), params, x, jax.random.key(0), target=CPU)
    without = usage_of(fuse(loss_fn, adalomo(1e-2)), params, x, target=CPU)
    assert 8 <= usage.argument_bytes - without.argument_bytes <= 16
