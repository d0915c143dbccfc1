"""What fits where, by the compilers for chips that are not there: minutes each, so only with ``-m slow``."""

import pytest
from on_targets import memory_rows, needs_cuda, needs_libtpu

pytestmark = pytest.mark.slow

GB = 10**9
SEVEN_B = ["--model", "llama-2-7b"]


@needs_libtpu
def test_7b_fits_a_v5e_and_only_fused():
    (fused,) = memory_rows(*SEVEN_B, "--device", "tpu-v5e").values()
    (unfused,) = memory_rows(*SEVEN_B, "--device", "tpu-v5e", "--no-fused").values()
    assert fused["fits"] and fused["peak_bytes"] <= 16 * GB
    assert not unfused["fits"] and unfused["temp_bytes"] is None and 25 * GB < unfused["peak_bytes"] < 31 * GB


@needs_libtpu
@pytest.mark.parametrize(("model", "most"), [("llama-2-13b", 32 * GB), ("llama-3-8b", 20 * GB)])
def test_larger_models_fit_a_v6e(model, most):
    (fused,) = memory_rows("--model", model, "--device", "tpu-v6e").values()
    assert fused["fits"] and fused["peak_bytes"] <= most


@needs_cuda
@pytest.mark.parametrize("device", ["rtx-4090", "h100"])
def test_7b_on_gpus(device):
    rows = memory_rows(*SEVEN_B, "--device", device, "--compare")
    assert rows["adalomo, fused"]["fits"] and rows["adalomo, fused"]["peak_bytes"] <= 16.5 * GB
    assert rows["lomo, fused"]["peak_bytes"] <= rows["adalomo, fused"]["peak_bytes"]
    for name in ("adalomo, unfused", "adafactor (optax), unfused"):
        assert 27 * GB < rows[name]["peak_bytes"] < 30 * GB
    moments = rows["adamw (optax, float32 moments), unfused"]
    assert moments["state_bytes"] > 4 * moments["params_bytes"] * 0.99 and not moments["fits"]


@pytest.mark.parametrize("model", ["llama-2-7b", "llama-2-13b", "llama-3-8b"])
@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
@pytest.mark.parametrize(
    "device",
    [pytest.param("h100", marks=needs_cuda), pytest.param("tpu-v5p", marks=needs_libtpu)],
)
def test_an_estimate_is_within_a_tenth(model, fused, device):
    options = ["--model", model, "--device", device, fused]
    (compiled,), (estimated,) = (memory_rows(*options, *more).values() for more in ([], ["--estimate"]))
    assert estimated["estimated"] and not compiled["estimated"]
    assert estimated["peak_bytes"] == pytest.approx(compiled["peak_bytes"], rel=0.1)
    for exact in ("params_bytes", "state_bytes"):
        assert estimated[exact] == compiled[exact]
