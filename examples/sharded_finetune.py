"""Trains a Llama on eight devices with FSDP and tensor parallelism, just as it would train on one.

    python examples/sharded_finetune.py

The CPU simulates the devices. Only the placement of arrays differs from training on one device. Parameters carry their
shardings; `fuse` keeps them, and shards the optimizer's state and each layer's gradient in the same way.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adalomo_jax import adalomo, fuse
from adalomo_jax.models import PRESETS, Decoder, batch_sharding, make_mesh, next_token_loss, param_shardings

jax.config.update("jax_num_cpu_devices", 8)  # before JAX makes an array; leave this out on real devices

STEPS, BATCH, LENGTH = 5, 8, 64


def train(mesh=None):
    """The losses, and the bytes of parameters and optimizer state on the first device."""
    spread = None if mesh is None else batch_sharding(mesh)
    model = lambda: Decoder(PRESETS["tiny"], rngs=nnx.Rngs(0), batch_sharding=spread)
    graphdef = nnx.graphdef(nnx.eval_shape(model))
    make_params = lambda: nnx.to_pure_dict(nnx.state(model(), nnx.Param))
    shardings = None if mesh is None else param_shardings(jax.eval_shape(make_params), mesh)
    params = jax.jit(make_params, out_shardings=shardings)()

    def loss_fn(params, tokens):
        return next_token_loss(nnx.merge(graphdef, params), tokens)

    step = fuse(loss_fn, adalomo(2e-2), max_grad_norm=1.0, microbatches=2)
    text = np.frombuffer(open(__file__, "rb").read(), np.uint8)
    generator, losses, state = np.random.default_rng(0), [], None
    for _ in range(STEPS):
        starts = generator.integers(0, len(text) - LENGTH, BATCH)
        tokens = jnp.asarray(text[starts[:, None] + np.arange(LENGTH)], jnp.int32)
        tokens = tokens if spread is None else jax.device_put(tokens, spread)
        state = step.init(params, tokens) if state is None else state
        params, state, loss, *_ = step.jit(params, state, tokens)
        losses.append(float(loss))
    on_device = lambda x: x.addressable_shards[0].data.nbytes
    return losses, sum(map(on_device, jax.tree.leaves((params, state))))


def main():
    alone, bytes_alone = train()
    spread, bytes_spread = train(make_mesh({"fsdp": 4, "tensor": 2}))
    for i, losses in enumerate(zip(alone, spread)):
        print(f"step {i}  loss on one device {losses[0]:.5f}, on eight {losses[1]:.5f}")
    print(f"parameters and state per device: {bytes_alone / 1e6:.2f} MB alone, {bytes_spread / 1e6:.2f} MB spread")
    np.testing.assert_allclose(spread, alone, rtol=1e-4)
    assert bytes_spread < bytes_alone / 6


if __name__ == "__main__":
    main()
