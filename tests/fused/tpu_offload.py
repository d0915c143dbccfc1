"""Compiles a step for an absent TPU with libtpu, with stacks and saved activations in host memory.

JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 python tpu_offload.py

Prints one JSON line per case: its name and bytes.
"""

import json

import jax
import jax.numpy as jnp
from compiled import memory_of, tree_bytes
from jax.experimental import topologies
from language_model import batch, init_params, make_loss

from adalomo_jax import adalomo, fuse

LAYERS, DIM, HIDDEN, VOCAB, BATCH, LENGTH = 32, 1024, 2048, 256, 4, 1024
CASES = {
    "plain": (None, {}),
    "params": ("params", {}),
    "activations": ("activations", {}),
    "both": (("params", "activations"), {}),
    "both, clipped microbatches": (("params", "activations"), {"max_grad_norm": 1.0, "microbatches": 2}),
}


def bytes_of(offload, options, device):
    """The compiler's sizes for the step, and the bytes of the stacks of matrices and of the saved layer inputs."""
    init = lambda: init_params(LAYERS, dim=DIM, hidden=HIDDEN, vocab=VOCAB, dtype=jnp.bfloat16)
    sharding = jax.sharding.SingleDeviceSharding(device)
    on_device = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    step = fuse(make_loss(), adalomo(1e-2), offload=offload, **options)
    tokens = on_device(jax.eval_shape(lambda: batch(batch_size=BATCH, length=LENGTH, vocab=VOCAB)))
    params = jax.tree.map(on_device, jax.eval_shape(init))
    state = jax.tree.map(on_device, jax.eval_shape(lambda: step.init(params, tokens)))
    sizes = memory_of(step.jit.lower(step.place(params, tokens), state, tokens).compile())
    return {
        "matrices": tree_bytes([x for x in params["layers0"].values() if x.ndim == 3]),
        "layers": LAYERS,
        "layer_inputs": 2 * LAYERS * BATCH * LENGTH * DIM,
        "arguments": sizes.argument_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "host_arguments": sizes.host_argument_size_in_bytes,
        "host_aliases": sizes.host_alias_size_in_bytes,
        "host_temporaries": sizes.host_temp_size_in_bytes,
    }


def main():
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1))
    for name, (offload, options) in CASES.items():
        print(json.dumps([name, bytes_of(offload, options, topology.devices[0])]), flush=True)


if __name__ == "__main__":
    main()
