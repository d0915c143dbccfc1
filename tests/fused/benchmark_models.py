"""Prints, of models as found, what the fused step costs over the unfused one: compile time, and time of a step.

    python tests/fused/benchmark_models.py [name ...]

Times of steps are medians of paired runs in one process, the two in turn first. Ratios below 1 are in favour of fused.
"""

import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from compiled import memory_of
from found_model import Sizes
from models_as_found import MODELS

from adalomo_jax import adalomo, fuse

SIZES = Sizes(layers=12, dim=256, batch=4, length=64)
PAIRS = 15


def compiled(fn, args):
    """The program, and the seconds that it took to trace and compile."""
    start = time.perf_counter()
    program = jax.jit(fn, donate_argnums=(0, 1)).lower(*args).compile()
    return program, time.perf_counter() - start


def compare(model):
    """Ratios of compile time, step time and temporaries."""
    step, batch = fuse(model.loss_fn, adalomo(1e-3), has_aux=model.has_aux), model.batch(0)
    state = step.init(model.params, *batch)
    programs, compile_seconds = zip(*(compiled(fn, (model.params, state, *batch)) for fn in (step, step.unfused)))
    now = [jax.tree.map(jnp.copy, (model.params, state)) for _ in programs]
    ratios = []
    for i in range(PAIRS):
        seconds = [0.0, 0.0]
        for k in (0, 1) if i % 2 else (1, 0):
            start = time.perf_counter()
            result = jax.block_until_ready(programs[k](*now[k], *batch))
            seconds[k], now[k] = time.perf_counter() - start, (result.params, result.state)
        ratios.append(seconds[0] / seconds[1])
    temporaries = [memory_of(program).temp_size_in_bytes for program in programs]
    return compile_seconds[0] / compile_seconds[1], statistics.median(ratios[2:]), temporaries[0] / temporaries[1]


def main():
    print(f"JAX {jax.__version__}, Python {platform.python_version()}, {jax.default_backend()}, {SIZES}, {PAIRS} pairs")
    print(f"{'fused / unfused':24}{'compile':>10}{'step':>10}{'temporaries':>14}")
    for name in sys.argv[1:] or MODELS:
        compile_ratio, step_ratio, temporaries = compare(MODELS[name](SIZES))
        print(f"{name:24}{compile_ratio:10.2f}{step_ratio:10.2f}{temporaries:14.2f}", flush=True)


if __name__ == "__main__":
    main()
