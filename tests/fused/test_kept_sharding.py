"""int8 and 24-bit weights on eight devices: the numbers of one, and each part stays spread as the floats would be."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sharded_model import SPREADS, init_params, make_loss, put, run
from tiers import slow

from adalomo_jax import adalomo, float24, floats, fuse, int8

ENCODE = {
    "int8": functools.partial(int8, block=4),
    "int8, blocks over devices": functools.partial(int8, block=16),
    "bf16+8": functools.partial(float24, where=lambda path: "up" in path or "down" in path),
}
AXIS_TYPES = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


@functools.cache
def on_one_device(form):
    result, losses = run(fuse(make_loss(), adalomo(1e-2)), ENCODE[form](init_params()), lambda args: args, 3)
    return result.params, losses


def differing(a, b):
    """The share of the layers' matrices that differs by more than sums in another order make up."""
    pairs = [[np.asarray(floats(tree)["layers"][name]) for tree in (a, b)] for name in ("up", "down")]
    return max(float(np.mean(np.abs(x - y) > 1e-4 * np.abs(x).max())) for x, y in pairs)


@pytest.mark.parametrize(
    ("form", "spread", "axis_type"),
    [
        ("int8", "fsdp and tensor", "automatic"),
        slow("int8", "fsdp", "explicit"),
        slow("int8, blocks over devices", "fsdp", "automatic"),
        slow("int8, blocks over devices", "fsdp and tensor", "explicit"),
        slow("int8", "tensor", "automatic"),
        slow("bf16+8", "fsdp and tensor", "explicit"),
        slow("bf16+8", "fsdp", "automatic"),
    ],
)
def test_numbers_and_shardings(form, spread, axis_type):
    mesh = SPREADS[spread].mesh(AXIS_TYPES[axis_type])
    place = lambda args: put(args, (P("fsdp"), P("fsdp")), mesh)
    with jax.set_mesh(mesh):
        params = ENCODE[form](put(init_params(), SPREADS[spread].specs, mesh))
        shardings = jax.tree.map(lambda x: x.sharding, params)
        up = params["layers"]["up"]
        if "over devices" not in form:
            assert up.sharding.is_equivalent_to(jax.NamedSharding(mesh, SPREADS[spread].specs["layers"]["up"]), 3)
        for part in jax.tree.leaves(up):  # each device has its share, along this axis or another
            assert part.sharding.shard_shape(part.shape) != part.shape
        result, losses = run(fuse(make_loss(axis_type == "explicit"), adalomo(1e-2)), params, place, 3)
        params = result.params
    for (path, x), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
    ):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), path
    expected, expected_losses = on_one_device(form)
    np.testing.assert_allclose(losses, expected_losses, 1e-3)
    assert differing(params, expected) <= 0.02 < differing(params, ENCODE[form](init_params()))
