"""Each target is a chip to compile for, and an error says what to install if its compiler is missing."""

import re

import pytest
from on_targets import installed

from adalomo_jax.memory import TARGETS, Unavailable, devices_of
from adalomo_jax.memory.targets import torus

EXTRAS = {"tpu": (["libtpu"], "tpu-aot"), "cuda": (["jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"], "cuda-aot")}


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "cpu"])
def test_a_missing_plugin_is_one_line_that_names_the_extra(name):
    modules, extra = EXTRAS[TARGETS[name].platform]
    if any(map(installed, modules)):
        pytest.skip("the plugin is installed")
    with pytest.raises(Unavailable) as refused:
        devices_of(TARGETS[name])
    assert f"pip install 'adalomo-jax[{extra}]'" in str(refused.value)
    assert "\n" not in str(refused.value) and "--estimate" in str(refused.value)


def test_limits_are_below_the_memory_that_is_sold():
    sold = {"tpu-v5e": 16, "tpu-v5p": 96, "tpu-v6e": 32, "h100": 80, "rtx-4090": 24}
    for name, gib in sold.items():
        assert 0.9 * gib * 2**30 < TARGETS[name].limit_bytes < gib * 2**30


def test_a_gpu_has_less_than_its_description_says():
    (size,) = re.findall(r"device_memory_size: (\d+)", TARGETS["h100"].description)
    assert TARGETS["h100"].limit_bytes == int(0.95 * int(size))


def test_the_cpu_has_the_memory_of_the_machine():
    assert TARGETS["cpu"].limit_bytes > 2**30
    (device,) = devices_of(TARGETS["cpu"])
    assert device.platform == "cpu"


def test_a_pod_slice_is_as_square_as_powers_of_two_can_be():
    assert [torus(n, 2) for n in (1, 2, 4, 8, 128, 256)] == [(1, 1), (1, 2), (2, 2), (2, 4), (8, 16), (16, 16)]
    assert [torus(n, 3) for n in (1, 2, 4, 8, 512)] == [(1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 2), (8, 8, 8)]


@pytest.mark.parametrize(("chips", "next_power"), [(3, 4), (12, 16), (0, 1)])
def test_a_pod_slice_of_another_number_is_refused(chips, next_power):
    with pytest.raises(Unavailable, match=f"power of two of chips, got {chips}; take {next_power}"):
        torus(chips, 2)


def test_more_cpu_devices_than_there_are_is_refused():
    with pytest.raises(Unavailable, match="not 1000: set jax_num_cpu_devices"):
        devices_of(TARGETS["cpu"], 1000)
