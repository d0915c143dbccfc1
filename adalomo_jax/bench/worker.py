"""A process that takes steps when it is told to: lines of JSON on its standard input and output.

The first line is what to measure. The process compiles the step and answers with what it then knows. It answers each
line ``step`` with the seconds of a step, and the end of its input with the most memory that it has had.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    order = json.loads(sys.stdin.readline())
    import jax

    from adalomo_jax.bench.contestants import Contestant
    from adalomo_jax.bench.steps import compile_step
    from adalomo_jax.models.config import config_of
    from adalomo_jax.training.memory_use import peak_bytes

    batch_size, seq_len = order["shape"]
    contestant = Contestant(**order["contestant"])
    compiled = compile_step(contestant, config_of(order["sizes"]), batch_size, seq_len, order["dtype"])

    def answer(value: object) -> None:
        print(json.dumps(value), file=answers, flush=True)

    found = {"compile_seconds": compiled.compile_seconds, "memory": compiled.memory, "params": compiled.params}
    answer(found | {"device": jax.devices()[0].device_kind})
    for _ in sys.stdin:
        answer(compiled.step())
    answer(peak_bytes())


if __name__ == "__main__":
    main()
