"""Prints the memory that a compiler reports for steps of lists at the widths of a 7B model, as one JSON line each.

python tests/fused/lists_at_width.py tpu-v5e 2 4    (targets of `adalomo_jax.memory.TARGETS`, numbers of layers)

Attention's kernels are of rank 3, as Flax, tunix and Gemma have them; each layer is rematerialized; weights are
bfloat16.
"""

import json
import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp

from adalomo_jax import adalomo, fuse
from adalomo_jax.memory import TARGETS, compile_usage

DIM, HIDDEN, HEADS, HEAD, LENGTH = 4096, 11008, 32, 128, 2048
SAVED_BYTES = 2 * LENGTH * DIM
"""The bytes that a layer saves: its input."""


def kernels() -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's weights."""
    heads = {"q_proj": (DIM, HEADS, HEAD), "k_proj": (DIM, HEADS, HEAD), "v_proj": (DIM, HEADS, HEAD)}
    mlp = {"gate": (DIM, HIDDEN), "up": (DIM, HIDDEN), "down": (HIDDEN, DIM)}
    return heads | {"o_proj": (HEADS, HEAD, DIM)} | mlp | {"norm": (DIM,), "mlp_norm": (DIM,)}


def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)).astype(scale.dtype) * scale


@jax.checkpoint
def layer(w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Attention whose scores are written out, and a gated feed-forward layer."""
    y = normed(x, w["norm"])
    q, k, v = (jnp.einsum("td,dnh->tnh", y, w[name]) for name in ("q_proj", "k_proj", "v_proj"))
    scores = jnp.einsum("tnh,snh->nts", q, k) * HEAD**-0.5
    scores = jnp.where(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), scores, -1e30)
    attended = jnp.einsum("nts,snh->tnh", jax.nn.softmax(scores.astype(jnp.float32), -1).astype(x.dtype), v)
    x = x + jnp.einsum("tnh,nhd->td", attended, w["o_proj"])
    y = normed(x, w["mlp_norm"])
    return x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"]


def loss_fn(params: dict[str, list[dict[str, jax.Array]]], x: jax.Array) -> jax.Array:
    for w in params["layers"]:
        x = layer(w, x)
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def measure(target: str, layers: int, step: str) -> dict[str, int | str]:
    """The bytes that one step needs beyond the weights: ``in a list``, ``stacked`` or ``unfused``."""
    one = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in kernels().items()}
    params, x = {"layers": [dict(one) for _ in range(layers)]}, jax.ShapeDtypeStruct((LENGTH, DIM), jnp.bfloat16)
    fused = fuse(loss_fn, adalomo(1e-3))
    if step == "stacked":
        params = fused.place(params, x)
    usage = compile_usage(fused, params, x, target=TARGETS[target], fused=step != "unfused")
    return {"target": target, "layers": layers, "step": step, "over_weights": usage.peak_bytes - usage.params_bytes}


if __name__ == "__main__":
    target, *numbers = sys.argv[1:]
    for layers in map(int, numbers):
        for step in ("in a list", "stacked", "unfused"):
            print(json.dumps(measure(target, layers, step)), flush=True)
