"""Prints the processor time to trace and compile a fused step, as a ratio to `jax.value_and_grad` and Optax.

    python tests/fused/benchmark_compile.py

A fused step also measures the norm of the gradient, and never writes non-finite values. So it is compared with the
bare step, and with one that does the same work: ``optax.tree.norm`` and ``optax.apply_if_finite``. Each figure is a
median of compilations in one process, in which all kinds take turns. Figures below 1 favour the fused step.
"""

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from language_model import batch, init_params, make_loss
from lists_of_layers import matrix

from adalomo_jax import adalomo, fuse

LAYERS, DIM, TIMES = 8, 64, 5


def plain_step(loss_fn: Callable, tx: optax.GradientTransformation, *, same_work: bool) -> Callable:
    """A step as users of Optax write it."""

    def step(params: Any, state: Any, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        norm = optax.tree.norm(grads) if same_work else None
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, norm

    return step


def layer(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    n = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["scale"]
    x = x + jax.nn.softmax((n @ p["q"]) @ (n @ p["k"]).swapaxes(-1, -2)) @ (n @ p["v"])
    return x + jax.nn.gelu(x @ p["up"]) @ p["down"]


def list_loss(params: Any, x: jax.Array) -> jax.Array:
    for p in params["layers"]:
        x = jax.checkpoint(layer)(p, x)
    return jnp.mean(jnp.square(x @ params["head"]))


def list_params() -> Any:
    shapes = {"up": (DIM, 2 * DIM), "down": (2 * DIM, DIM), "q": (DIM, DIM), "k": (DIM, DIM), "v": (DIM, DIM)}
    of_layer = lambda i: {name: matrix(i, *shape) for name, shape in shapes.items()} | {"scale": jnp.ones(DIM)}
    return {"layers": [of_layer(i) for i in range(LAYERS)], "head": matrix(LAYERS, DIM, DIM)}


def seconds_of(step: Callable, args: Any) -> float:
    jax.clear_caches()
    began = time.process_time()
    jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
    return time.process_time() - began


def compare(loss_fn: Callable, params: Any, x: jax.Array, tx: Any, plain_tx: Any) -> tuple[float, float]:
    """The ratios to the bare step and to the one that does the same work."""
    fused, guarded = fuse(loss_fn, tx), optax.apply_if_finite(plain_tx, 10**6)
    placed = fused.place(params, x)
    cases = [
        (fused.__call__, (placed, fused.init(placed, x), x)),
        (plain_step(loss_fn, plain_tx, same_work=False), (params, plain_tx.init(params), x)),
        (plain_step(loss_fn, guarded, same_work=True), (params, guarded.init(params), x)),
    ]
    times = [[seconds_of(*case) for case in cases] for _ in range(TIMES)]
    ours, bare, same = map(statistics.median, zip(*times))
    return ours / bare, ours / same


def main() -> None:
    scanned = init_params(LAYERS, dim=DIM, hidden=2 * DIM, vocab=64)
    axes = jax.tree_util.tree_map_with_path(lambda path, _: 0 if "layers" in str(path[0]) else None, scanned)
    models = {
        "scan": (make_loss("remat"), scanned, batch(batch_size=2, length=32, vocab=64), adalomo(1e-3, layer_axes=axes)),
        "list": (list_loss, list_params(), jnp.ones((2, 32, DIM)), adalomo(1e-3)),
    }
    print(f"JAX {jax.__version__}, Python {platform.python_version()}, {jax.default_backend()}, {LAYERS} layers")
    print(f"{'fused /':20}{'bare step':>12}{'the same work':>16}")
    for name, (loss_fn, params, x, plain) in models.items():
        for rule, tx, plain_tx in (("adalomo", adalomo(1e-3), plain), ("adamw", *[optax.adamw(1e-3)] * 2)):
            bare, same = compare(loss_fn, params, x, tx, plain_tx)
            print(f"{f'{name}, {rule}':20}{bare:12.2f}{same:16.2f}", flush=True)


if __name__ == "__main__":
    main()
