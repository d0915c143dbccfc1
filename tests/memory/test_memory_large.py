"""Compilers say what fits which chip, without the chip; tests take minutes each, so they run only with ``-m slow``."""

import pytest
from on_targets import memory_rows, needs_cuda, needs_libtpu

pytestmark = pytest.mark.slow

GB = 10**9
SEVEN_B = ["--model", "llama-2-7b"]


WEIGHTS = {"llama-3-8b": 2 * 8_030_261_248}
"""Bytes of the weights in bfloat16."""


def one_row(*options):
    (row,) = memory_rows(*options).values()
    return row


@needs_libtpu
def test_7b_fits_a_v5e_and_only_fused():
    fused, unfused = (one_row(*SEVEN_B, "--device", "tpu-v5e", *more) for more in ([], ["--no-fused"]))
    assert fused["fits"] and fused["peak_bytes"] <= 14.9 * GB
    assert not unfused["fits"] and unfused["temp_bytes"] is None and 25 * GB < unfused["peak_bytes"] < 31 * GB


@needs_libtpu
def test_a_long_sequence_fits_a_v5e_with_activations_offloaded():
    options = [*SEVEN_B, "--device", "tpu-v5e", "--seq-len", "8192"]
    offloaded, not_offloaded = one_row(*options, "--offload", "activations"), one_row(*options)
    assert offloaded["fits"] and not not_offloaded["fits"]
    assert offloaded["host_bytes"] >= 32 * 8192 * 4096 * 2


@needs_libtpu
def test_13b_fits_a_v6e():
    assert one_row("--model", "llama-2-13b", "--device", "tpu-v6e")["fits"]


@needs_libtpu
def test_a_large_vocabulary_adds_little_to_the_weights():
    row = one_row("--model", "llama-3-8b", "--device", "tpu-v6e")
    assert row["fits"] and row["peak_bytes"] <= WEIGHTS["llama-3-8b"] + 2.2 * GB


@needs_libtpu
def test_65b_fits_16_chips():
    """Devices sum gradients where they keep them, and gather a layer's matrices and the head, but no whole stack."""
    options = ["--model", "llama-65b", "--device", "tpu-v5e", "--batch-size", "16", "--chips", "16"]
    row = one_row(*options, "--shard", "fsdp=16")
    assert row["fits"] and row["peak_bytes"] <= 14.0 * GB
    matrix = 2 * 8192 * 8192
    assert row["collectives"]["all-reduce"]["bytes"] < 0.1 * matrix
    assert row["collectives"]["all-gather"]["bytes"] < 80 * matrix / 4


@needs_libtpu
def test_65b_streamed_from_the_host():
    row = one_row("--model", "llama-65b", "--device", "tpu-v5e", "--offload", "params")
    assert row["fits"] and row["peak_bytes"] <= 7 * GB
    assert 129 * GB < row["host_bytes"] < 130 * GB


@needs_libtpu
def test_65b_on_512_chips():
    options = ["--model", "llama-65b", "--device", "tpu-v5p", "--batch-size", "64", "--chips", "512"]
    row = one_row(*options, "--shard", "fsdp=64,tensor=8")
    assert row["fits"] and row["collectives"]


@needs_cuda
@pytest.mark.parametrize("device", ["rtx-4090", "h100"])
def test_7b_on_gpus(device):
    rows = memory_rows(*SEVEN_B, "--device", device, "--compare")
    assert rows["adalomo, fused"]["fits"] and rows["adalomo, fused"]["peak_bytes"] <= 15.6 * GB
    assert rows["lomo, fused"]["peak_bytes"] <= 15.6 * GB  # its state is smaller, but the compiler's figure is not
    for name in ("adalomo, unfused", "adafactor (optax, float32 moments), unfused"):
        assert 27 * GB < rows[name]["peak_bytes"] < 30 * GB
    moments = rows["adamw (optax, float32 moments), unfused"]
    assert moments["state_bytes"] > 4 * moments["params_bytes"] * 0.99 and not moments["fits"]


@pytest.mark.parametrize("model", ["llama-2-7b", "llama-2-13b", "llama-3-8b"])
@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
@pytest.mark.parametrize(
    "device",
    [pytest.param("h100", marks=needs_cuda), pytest.param("tpu-v5p", marks=needs_libtpu)],
)
def test_a_bound_of_a_large_preset_is_below_the_compiled_figure(model, fused, device):
    options = ["--model", model, "--device", device, fused]
    (compiled,), (estimated,) = (memory_rows(*options, *more).values() for more in ([], ["--estimate"]))
    assert estimated["estimated"] and not compiled["estimated"]
    assert 0.8 * compiled["peak_bytes"] < estimated["peak_bytes"] <= compiled["peak_bytes"]
    for exact in ("params_bytes", "state_bytes"):
        assert estimated[exact] == compiled[exact]
