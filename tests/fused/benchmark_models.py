"""Prints what the fused step of each found model costs over the unfused one, in compile time and step time.

    python tests/fused/benchmark_models.py [--dim 512] [name ...]

Both are medians of paired runs in one process; the two steps take turns to go first. Ratios below 1 favour fused.
"""

import argparse
import platform
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from compiled import memory_of
from found_model import Sizes
from models_as_found import MODELS

from adalomo_jax import adalomo, fuse

PAIRS, COMPILATIONS = 15, 3


def compiled(fn, args):
    """The program, and the seconds that it took to trace and compile."""
    jax.clear_caches()
    start = time.perf_counter()
    program = jax.jit(fn, donate_argnums=(0, 1)).lower(*args).compile()
    return program, time.perf_counter() - start


def in_turn(times, run):
    """The median ratio of the seconds that ``run(0)`` and ``run(1)`` return; their order alternates between pairs."""
    ratios = []
    for i in range(times):
        seconds = {k: run(k) for k in ((0, 1) if i % 2 else (1, 0))}
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def compare(model):
    """Ratios of compile time, step time and temporaries."""
    step, batch = fuse(model.loss_fn, adalomo(1e-3), has_aux=model.has_aux), model.batch(0)
    state = step.init(model.params, *batch)
    functions: tuple[Any, ...] = (step, step.unfused)
    programs: list[Any] = [None, None]
    now = [jax.tree.map(jnp.copy, (model.params, state)) for _ in functions]

    def compile_one(k):
        programs[k], seconds = compiled(functions[k], (model.params, state, *batch))
        return seconds

    def run_one(k):
        start = time.perf_counter()
        result = jax.block_until_ready(programs[k](*now[k], *batch))
        seconds, now[k] = time.perf_counter() - start, (result.params, result.state)
        return seconds

    compile_ratio = in_turn(COMPILATIONS, compile_one)
    in_turn(2, run_one)  # the first runs are slower
    step_ratio = in_turn(PAIRS, run_one)
    temporaries = [memory_of(program).temp_size_in_bytes for program in programs]
    return compile_ratio, step_ratio, temporaries[0] / temporaries[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="name", help="of models; all by default")
    parser.add_argument("--dim", type=int, default=512, help="width of the layers")
    options = parser.parse_args()
    sizes = Sizes(layers=12, dim=options.dim, batch=4, length=64)
    print(f"JAX {jax.__version__}, Python {platform.python_version()}, {jax.default_backend()}, {sizes}, {PAIRS} pairs")
    print(f"{'fused / unfused':24}{'compile':>10}{'step':>10}{'temporaries':>14}")
    for name in options.names:
        compile_ratio, step_ratio, temporaries = compare(MODELS[name](sizes))
        print(f"{name:24}{compile_ratio:10.2f}{step_ratio:10.2f}{temporaries:14.2f}", flush=True)


if __name__ == "__main__":
    main()
