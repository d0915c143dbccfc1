"""Prints how the time of adalomo's fused step, and the time to compile it, grow with depth.

    python tests/bench/benchmark_depth.py [--layers 4 8 16 32 48] [--seq-len 64] [--rounds 9] [--compilations 5]

`adalomo-jax bench --layers` measures one depth after the other, so a machine that is busier for some minutes bends the
line. Here the depths take turns, both to run steps and to compile. Each compilation has a process of its own. Seconds
are medians.
"""

import argparse
import dataclasses
import statistics
from functools import partial

from adalomo_jax.bench.contestants import CONTESTANTS, REFERENCE, Case
from adalomo_jax.bench.measure import measure, start_worker
from adalomo_jax.bench.tables import Result, line_through, machine
from adalomo_jax.models import PRESETS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=list(PRESETS))
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32, 48])
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compilations", type=int, default=5)
    options = parser.parse_args()
    contestant = next(c for c in CONTESTANTS if c.name == REFERENCE)
    cases = [Case(options.model, layers, 1, options.seq_len, "float32") for layers in options.layers]
    deep = lambda case: dataclasses.replace(PRESETS[options.model], num_hidden_layers=case.layers)
    starts = {str(case.layers): partial(start_worker, case, contestant, deep(case)) for case in cases}
    print(machine())

    compiled: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(options.compilations - 1):
        for name, start in starts.items():
            worker = start()
            compiled[name].append(worker.compiled["compile_seconds"])
            worker.kill()
    found = measure(starts, options.rounds, lambda _: None)
    results = []
    for case, one in zip(cases, found, strict=True):
        to_compile = statistics.median([*compiled[one.name], one.compile_seconds or 0.0])
        results.append(Result(case, [one._replace(name=REFERENCE, compile_seconds=to_compile)]))
        print(f"{case.layers} layers: {statistics.median(one.seconds):.3f} s a step, {to_compile:.2f} s to compile")
    line = line_through(results, REFERENCE)
    assert line is not None and line.compile_ratio is not None
    print(
        f"{1e3 * line.per_layer:.1f} ms a layer; off a line at most {line.largest_residual:.1%}; "
        f"longest compilation over shortest {line.compile_ratio:.2f}"
    )


if __name__ == "__main__":
    main()
