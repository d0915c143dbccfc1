"""The command uses a TPU's compiler with no TPU present."""

import json

import pytest
from on_targets import memory_rows, needs_libtpu

pytestmark = needs_libtpu

SIZES = dict(model_type="llama", vocab_size=512, hidden_size=1024, intermediate_size=2048, num_hidden_layers=96)
SIZES |= dict(num_attention_heads=8, max_position_embeddings=256)
"""Each stack of matrices is larger than the 128 MiB of VMEM in a chip, which the figures leave out."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(SIZES))
    return str(path)


@pytest.fixture(scope="module")
def small(config):
    return ["--model", config, "--device", "tpu-v5e", "--seq-len", "128"]


def test_the_fused_step_has_one_layers_gradients(small):
    (fused,) = memory_rows(*small).values()
    (unfused,) = memory_rows(*small, "--no-fused").values()
    assert fused["fits"] and fused["target"] == "tpu-v5e"
    assert fused["alias_bytes"] >= fused["params_bytes"] + fused["state_bytes"]
    assert unfused["peak_bytes"] - fused["peak_bytes"] > 0.9 * fused["params_bytes"]
    assert fused["temp_bytes"] < 0.2 * fused["params_bytes"]


def test_a_slice_of_a_pod(small):
    (row,) = memory_rows(*small, "--chips", "4", "--shard", "fsdp=2,tensor=2", "--batch-size", "2").values()
    (one,) = memory_rows(*small, "--batch-size", "2", "--estimate").values()
    assert row["limit_bytes"] == one["limit_bytes"]
    assert 0.25 * one["params_bytes"] <= row["params_bytes"] < 0.26 * one["params_bytes"]
    assert row["peak_bytes"] < 0.6 * one["peak_bytes"]


def test_what_is_too_large_is_refused_with_its_size(config, small):
    sizes = json.loads(open(config).read()) | {"num_hidden_layers": 2400, "vocab_size": 256}
    path = config.replace("config.json", "large.json")
    with open(path, "w") as file:
        json.dump(sizes, file)
    (row,) = memory_rows("--model", path, *small[2:]).values()
    assert not row["fits"] and row["temp_bytes"] is None
    assert row["peak_bytes"] > row["params_bytes"] > row["limit_bytes"]
