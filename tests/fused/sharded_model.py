"""A model spread over a mesh: a stack of layers between two uses of one matrix, on automatic and explicit meshes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

LAYERS, BATCH, IN, DIM, HIDDEN = 3, 16, 24, 32, 64


class Spread(NamedTuple):
    """A way to spread the model."""

    sizes: tuple[int, int]
    """The sizes of the mesh axes ``fsdp``, over which the batch is spread, and ``tensor``."""
    specs: dict[str, Any]
    """The partition specs of the parameters."""

    def mesh(self, axis_type: AxisType) -> Mesh:
        return jax.make_mesh(self.sizes, ("fsdp", "tensor"), axis_types=(axis_type,) * 2)


def specs(fsdp, tensor):
    layers = {"scale": P(), "up": P(None, fsdp, tensor), "down": P(None, tensor, fsdp)}
    return {"embed": P(None, fsdp), "layers": layers}


SPREADS = {
    "data": Spread((8, 1), specs(None, None)),
    "fsdp": Spread((8, 1), specs("fsdp", None)),
    "tensor": Spread((1, 8), specs(None, "tensor")),
    "fsdp and tensor": Spread((4, 2), specs("fsdp", "tensor")),
}


def init_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)  # JAX's would compile a program for each shape
    normal = lambda *shape: jnp.asarray(0.3 * rng.standard_normal(shape), dtype)
    layers = {"scale": jnp.asarray(np.ones((LAYERS, DIM)), dtype), "up": normal(LAYERS, DIM, HIDDEN)}
    return {"embed": normal(IN, DIM), "layers": layers | {"down": normal(LAYERS, HIDDEN, DIM)}}


def batch(seed):
    x, y = np.random.default_rng(seed).standard_normal((2, BATCH, IN), np.float32)
    return jnp.asarray(x), jnp.asarray(y)


def put(tree, specs, mesh):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def make_loss(explicit=False):
    """``loss_fn(params, x, y)``. On an explicit mesh the loss says when to gather, and how to spread results."""
    gather = jax.sharding.reshard if explicit else lambda w, spec: w

    def dot(x, w, *spec):
        return jnp.einsum("bi,ij->bj", x, w, out_sharding=P(*spec) if explicit else None)

    def layer(x, w):
        up, down = gather(w["up"], P(None, "tensor")), gather(w["down"], P("tensor", None))
        hidden = jnp.tanh(dot(x * w["scale"], up, "fsdp", "tensor"))
        return x + dot(hidden, down, "fsdp", None), None

    def loss_fn(params, x, y):
        embed = gather(params["embed"], P(None, None))
        hidden = dot(x, embed, "fsdp", None)
        hidden, _ = jax.lax.scan(jax.checkpoint(layer), hidden, params["layers"])
        return jnp.mean((dot(hidden, embed.T, "fsdp", None) - y) ** 2)

    return loss_fn


def run(step, params, place, steps=5):
    """The result of the last step, and all losses."""
    state, losses = step.init(params, *place(batch(0))), []
    for i in range(steps):
        result = step.jit(params, state, *place(batch(i)))
        params, state = result.params, result.state
        losses.append(float(result.loss))
    return result, losses
