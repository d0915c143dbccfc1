"""Chips to compile for, which need not be present: what JAX is told about them, and the memory of each."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any, Literal

import jax
from jax.experimental import topologies

GPU_USABLE_SHARE = 0.95
"""The share of a GPU's memory that a process can have. The driver, the CUDA context and the libraries hold the rest."""

_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_CHIPS_PER_HOST_BOUNDS": "1,1,1",
}
"""With these, libtpu asks neither a cloud's metadata server nor a lock file for chips, nor reports them missing."""


class Unavailable(Exception):
    """Nothing can be compiled for a target here; the message is one line and says what to install or give instead."""


@dataclass(frozen=True)
class Target:
    """A chip that a step can be compiled for."""

    name: str
    """The name that the command takes."""
    platform: Literal["tpu", "cuda", "cpu"]
    generation: str = ""
    """For a TPU, how the names of its topologies begin; for a GPU, the file in ``memory/gpu`` that describes it."""
    dimensions: int = 0
    """Dimensions of the torus in which the chips of a TPU pod lie."""
    usable_gib: float = 0.0
    """For a TPU, the memory that libtpu compares a program with, as its refusals state it. GiB are 2**30 bytes."""
    vector_mib: int = 0
    """For a TPU, a core's vector memory (VMEM), where XLA keeps results. MiB are 2**20 bytes."""

    @cached_property
    def limit_bytes(self) -> int:
        """Bytes that a program may use on one chip; for a CPU, the machine's memory."""
        if self.platform == "tpu":
            return int(self.usable_gib * 2**30)
        if self.platform == "cuda":
            return int(GPU_USABLE_SHARE * int(re.findall(r"device_memory_size: (\d+)", self.description)[0]))
        if not hasattr(os, "sysconf"):  # Windows
            raise Unavailable("this system does not say how much memory it has; name a --device other than cpu")
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @property
    def description(self) -> str:
        """What the compiler must know about a GPU: a GpuTargetConfigProto as text."""
        return (resources.files("adalomo_jax.memory") / "gpu" / f"{self.generation}.txtpb").read_text()


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("tpu-v5e", "tpu", "v5e", dimensions=2, usable_gib=15.75, vector_mib=128),
        Target("tpu-v5p", "tpu", "v5p", dimensions=3, usable_gib=95.73, vector_mib=64),
        Target("tpu-v6e", "tpu", "v6e", dimensions=2, usable_gib=31.24, vector_mib=128),
        Target("h100", "cuda", "h100"),
        Target("rtx-4090", "cuda", "rtx-4090"),
        Target("rtx-4070", "cuda", "rtx-4070"),
        Target("cpu", "cpu"),
    )
}
"""The targets by name. ``cpu`` is this machine's."""


def prepare(target: Target, chips: int = 1) -> None:
    """Has JAX start on the CPU alone, without looking for the chip that a plugin is installed for.

    It also turns off JAX's cache of compiled programs: JAX can write those for an absent chip, but not read them again.

    Call it before JAX has made an array or named a device. Later it changes nothing.
    """
    _set_libtpu()
    jax.config.update("jax_platforms", "cpu")
    if target.platform != "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
    if target.platform == "cpu" and chips > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has started
            jax.config.update("jax_num_cpu_devices", chips)


def devices_of(target: Target, chips: int = 1) -> Sequence[Any]:
    """The devices to compile for. Except for a CPU, they are descriptions, which hold no arrays and run nothing.

    Args:
        target: of `TARGETS`.
        chips: how many, a power of two for TPUs.

    Raises:
        Unavailable: the plugin that compiles for the target is not installed, or there are not this many chips.

    Example:
        >>> len(devices_of(TARGETS["cpu"]))
        1
    """
    if target.platform == "cpu":
        return _of_cpu(chips)
    check_plugin(target)
    if target.platform == "cuda":
        shape = f"1x{chips}x1"
        described = topologies.get_topology_desc(
            platform="cuda", target_config=target.description, topology=shape, topology_name=shape
        )
        return described.devices
    _set_libtpu()
    shape = torus(chips, target.dimensions)
    # A pod's hosts have four chips or more, and libtpu has to be told of a host with fewer.
    bounds = {"chips_per_host_bounds": (*shape, 1, 1)[:3]} if chips < 4 else {}
    name = f"{target.generation}:{'x'.join(map(str, shape))}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds).devices


def check_plugin(target: Target) -> None:
    """Raise Unavailable, with the extra to install, if there is no compiler for the target."""
    modules, extra = {
        "tpu": (["libtpu"], "tpu-aot"),
        "cuda": (["jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"], "cuda-aot"),
        "cpu": ([], ""),
    }[target.platform]
    if modules and not any(_installed(module) for module in modules):
        raise Unavailable(
            f"to compile for {target.name} its compiler must be installed: pip install 'adalomo-jax[{extra}]'; "
            "a lower bound from shapes needs none: --estimate"
        )


def torus(chips: int, dimensions: int) -> tuple[int, ...]:
    """The sides of the pod slice with this many chips, as near to each other as powers of two can be.

    Example:
        >>> torus(16, 2), torus(32, 2), torus(512, 3)
        ((4, 4), (4, 8), (8, 8, 8))
    """
    if chips < 1 or chips & (chips - 1):
        raise Unavailable(f"a slice of a TPU pod has a power of two of chips, got {chips}; take {_power_above(chips)}")
    doublings = chips.bit_length() - 1
    sides = [2 ** ((doublings + i) // dimensions) for i in range(dimensions)]
    assert math.prod(sides) == chips
    return tuple(sides)


def _of_cpu(chips: int) -> Sequence[Any]:
    devices = jax.devices("cpu")
    if len(devices) < chips:
        raise Unavailable(
            f"JAX has {len(devices)} CPU devices here, not {chips}: set jax_num_cpu_devices before it starts"
        )
    return devices[:chips]


def _set_libtpu() -> None:
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)


def _power_above(chips: int) -> int:
    return 1 << max(chips, 1).bit_length() if chips > 0 else 1


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in is missing
        return False
