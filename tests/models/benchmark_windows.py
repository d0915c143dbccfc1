"""Prints what attention takes in layers of which five of six have a window, in three ways, forward and backward.

    python tests/models/benchmark_windows.py            # seconds, too: ratios of calls in turn
    python tests/models/benchmark_windows.py tpu-v5e    # memory and the size of the program; or tpu-v6e, h100, cpu

- branches: a scan over the layers, in which a traced bool chooses between two kernels, as `causal_attention` does it.
- mask: a scan in which one kernel computes all scores, and the bool only changes which of them count.
- period: a scan over six layers at a time, each with its own kernel. Stacks of single layers cannot be scanned so.

Sizes are those of Gemma 3 1B: 4 heads of 256 over one key head, a window of 512.
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from adalomo_jax.memory import TARGETS
from adalomo_jax.memory.targets import devices_of
from adalomo_jax.models.attention import causal_attention, kind_for

PERIOD = [True] * 5 + [False]
LAYERS, T, N, K, H, WINDOW = 12, 2048, 4, 1, 256, 512
CALLS = 7


def ways(kind):
    attend = lambda x, w, **options: (
        x
        + causal_attention((x * w).reshape(1, T, N, H), *(x[..., : K * H].reshape(1, T, K, H),) * 2, **options).reshape(
            1, T, N * H
        )
    )
    of_scan = lambda layer, x, xs: jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, xs)[0].astype(jnp.float32))
    is_windowed = jnp.asarray(PERIOD * (LAYERS // 6))

    def branches(x, w_L):
        layer = lambda x, xs: (attend(x, xs[0], kind=kind, window=WINDOW, is_windowed=xs[1]), None)
        return of_scan(layer, x, (w_L, is_windowed))

    def mask(x, w_L):  # comparing positions with a traced window costs nothing beside the products
        return of_scan(lambda x, w: (attend(x, w, kind=kind), None), x, w_L)

    def period(x, w_L):
        def layers(x, w_P):
            for w, windowed in zip(w_P, PERIOD):
                x = jax.checkpoint(lambda x, w, o: attend(x, w, kind=kind, window=o), static_argnums=2)(
                    x, w, WINDOW if windowed else None
                )
            return x, None

        return of_scan(layers, x, w_L.reshape(-1, 6))

    return {"branches": branches, "mask": mask, "period": period}


def main(target="cpu"):
    device = devices_of(TARGETS[target])[0]
    kind = kind_for(TARGETS[target].platform, T, H, jnp.bfloat16)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device))
    compiled = {}
    for way, f in ways(kind).items():
        start = time.perf_counter()
        compiled[way] = jax.jit(jax.grad(f, (0, 1))).lower(of(1, T, N * H), of(LAYERS)).compile()
        seconds, letters = time.perf_counter() - start, len(compiled[way].as_text())
        temporaries = compiled[way].memory_analysis().temp_size_in_bytes / 1e6
        print(f"{target}, {kind}, {way}: {temporaries:.1f} MB, compiled in {seconds:.1f} s, {letters:,} letters")
    if target != "cpu":
        return
    random = np.random.default_rng(0)
    args = [jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in ((1, T, N * H), (LAYERS,))]

    def seconds_of(way):
        start = time.perf_counter()
        jax.block_until_ready(compiled[way](*args))
        return time.perf_counter() - start

    calls = [{way: seconds_of(way) for way in compiled} for _ in range(CALLS + 1)][1:]
    for way in compiled:
        ratio = statistics.median(call[way] / call["branches"] for call in calls)
        print(f"{way}: {statistics.median(call[way] for call in calls):.3f} s, {ratio:.2f} of branches")


if __name__ == "__main__":
    main(*sys.argv[1:])
