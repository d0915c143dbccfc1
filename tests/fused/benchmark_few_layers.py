"""Prints the MB that a few layers in a list need beyond their weights: unfused, fused in a list, and fused as a stack.

    python tests/fused/benchmark_few_layers.py tpu-v5e 3 4 5 6    (targets of `adalomo_jax.memory`, numbers of layers)

Residuals outside of any `jax.checkpoint` are saved, and XLA saves fewer of them for a list than for a scan. So `fuse`
stacks such layers only if there are enough of them to outweigh this. Nothing is allocated or run.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import lists_of_layers as lists
from lists_of_layers import apply, error, fuse_lists, matrix

from adalomo_jax import adalomo
from adalomo_jax.memory import TARGETS, compile_usage, prepare

Layer = Callable[[Any, Any, jax.Array], jax.Array]


def masked(params: Any, p: Any, x: jax.Array) -> jax.Array:
    q = apply(p, x)
    is_seen = jnp.tril(jnp.ones((x.shape[-2], x.shape[-2]), bool))
    return x + jax.nn.softmax(jnp.where(is_seen, q @ q.swapaxes(-1, -2), -1e9)) @ q


def in_part(params: Any, p: Any, x: jax.Array) -> jax.Array:
    mlp = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"])
    return x + mlp(p, x * p["scale"])


LAYERS: dict[str, Layer] = {
    "gelu": lambda params, p, x: apply(p, x, jax.nn.gelu),
    "relu": lambda params, p, x: apply(p, x),
    "masked": masked,
    "reads a shared matrix": lambda params, p, x: apply(p, x) + 0.1 * jnp.tanh(x @ params["shared"].T),
    "a checkpoint in part": in_part,
    "a checkpoint of the layer": lambda params, p, x: jax.checkpoint(apply)(p, x),
}
"""Layers by kind: functions of all parameters, the layer's own, and its input."""


def model(layer: Layer, n: int) -> lists.ListModel:
    def loss(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        x = x @ params["into"]
        for p in params["layers"]:
            x = layer(params, p, x)
        return error(x @ params["head"])

    return lists.model(n, loss, {}, shared=matrix(60, lists.DIM, lists.DIM))


def measure(target: str, layer: Layer, n: int) -> tuple[int, list[float]]:
    """Bytes of the weights, and the bytes that each way needs beyond them."""
    found: list[lists.ListModel] = []
    params = jax.eval_shape(lambda: found.append(model(layer, n)) or found[0].params)
    args, step = jax.eval_shape(lambda: lists.data(0)), fuse_lists(found[0].loss_fn, adalomo(1e-2))
    of = partial(compile_usage, step, target=TARGETS[target])
    usages = [of(params, *args, fused=False), of(params, *args), of(step.place(params, *args), *args)]
    return usages[0].params_bytes, [usage.peak_bytes - usage.params_bytes for usage in usages]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("layers", nargs="+", type=int)
    parser.add_argument("--dim", type=int, default=2048, help="width; 512 tokens")
    options = parser.parse_args()
    prepare(TARGETS[options.target])
    lists.DIM, lists.LENGTH, lists.BATCH = options.dim, 512, 1
    print(f"JAX {jax.__version__}, {options.target}, {options.dim} wide")
    print(f"{'layers':28}{'weights':>10}{'unfused':>10}{'list':>10}{'stack':>10}")
    for name, layer in LAYERS.items():
        for n in options.layers:
            weights, over = measure(options.target, layer, n)
            numbers = "".join(f"{x / 1e6:10.1f}" for x in (weights, *over))
            print(f"{f'{n} {name}':28}{numbers}" + ("  stack MORE" if over[2] > over[0] else ""), flush=True)


if __name__ == "__main__":
    main()
