"""Prints the seconds and memory of a finetune step for each optimizer in examples/further_pretraining.py.

    python tests/training/benchmark_optimizers.py [--model smollm2] [--seq-len 512] [--steps 9]

The optimizers take steps in turn, on the same batches, in one process, so that a busy machine slows all equally. The
seconds are medians; the memory is the compiler's figure for arguments, outputs and temporaries.
"""

import argparse
import dataclasses
import platform
import runpy
import statistics
import time
from pathlib import Path

import jax

from adalomo_jax.commands.finetune import data_of, model_of
from adalomo_jax.text.batches import training_batches
from adalomo_jax.training.config import FinetuneConfig
from adalomo_jax.training.program import build_program

ROWS = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "further_pretraining.py"))["ROWS"]


def seconds_of(program, batches):
    """Yields the seconds of a step for each batch; the first step warms up."""
    params, state = program.params, program.state
    for batch in batches:
        start = time.perf_counter()
        result = jax.block_until_ready(program.step(params, state, batch))
        params, state = result.params, result.state
        yield time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=9)
    options = parser.parse_args()
    common = FinetuneConfig(model=options.model, batch_size=1, seq_len=options.seq_len, update_rms=False)
    model = model_of(common.model)
    data = data_of(common, model, None)
    programs, taking = {}, {}
    for row, (of_row, (rate, *_)) in ROWS.items():
        programs[row] = build_program(dataclasses.replace(common, learning_rate=rate, **of_row), model)
        batches = iter(training_batches(data, batch_size=1, seed=0))
        taking[row] = seconds_of(programs[row], (next(batches) for _ in range(options.steps + 1)))
    seconds = [{row: next(steps) for row, steps in taking.items()} for _ in range(options.steps + 1)][1:]
    print(f"{platform.machine()}, {jax.device_count()} {jax.default_backend()} device, JAX {jax.__version__}")
    print("| optimizer | seconds a step | least to most | over adalomo | memory of a step |\n|---|---|---|---|---|")
    for row, program in programs.items():
        times = [step[row] for step in seconds]
        ratio = statistics.median(step[row] / step["adalomo, float32"] for step in seconds)
        spread, memory = f"{min(times):.2f} to {max(times):.2f}", f"{program.compiled_bytes / 1e9:.2f} GB"
        print(f"| {row} | {statistics.median(times):.2f} | {spread} | {ratio:.2f} | {memory} |")


if __name__ == "__main__":
    main()
