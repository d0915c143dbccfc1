"""Compiles models as found for an absent TPU with libtpu and prints what their steps need, one JSON line per model.

JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 python tpu_memory.py NAME ...
"""

import json
import sys

import jax
from compiled import compile_steps
from found_model import Model, Sizes
from jax.experimental import topologies
from models_as_found import MODELS

from adalomo_jax import adalomo

SIZES = Sizes(layers=32, dim=1024, batch=1, length=128)
"""Each stack of matrices is larger than the chip's 128 MiB of VMEM, which `temp_size_in_bytes` does not count.

All are also multiples of the tiles that arrays are padded to.
"""


def abstract_model(name: str) -> Model:
    """A model whose parameters are shapes."""
    found = []
    params = jax.eval_shape(lambda: found.append(MODELS[name](SIZES)) or found[0].params)
    return found[0]._replace(params=params)


def main():
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1))
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    place = lambda args: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    for name in sys.argv[1:]:
        memory = compile_steps(abstract_model(name), adalomo(1e-2), place).memory
        print(json.dumps([name, memory._asdict()]), flush=True)


if __name__ == "__main__":
    main()
