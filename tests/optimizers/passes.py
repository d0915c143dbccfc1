"""Prints how often the update of one matrix passes over it, as compilers write it for chips that need not be present.

    python tests/optimizers/passes.py cpu tpu-v5e tpu-v6e h100 rtx-4090

A pass is a kernel that reads or writes all of the gradient or of the weights. Kernels are the instructions of a
compiled program outside its fusions. The least that AdaLomo's equations allow is three reads of the gradient, two of
the weights, and one write (adalomo_jax/optimizers/moments.py). The script also prints bytes per weight by the
compiler's own count, if it has one, and its temporaries. Every write of the matrix's size counts: a float32 copy of
bfloat16 weights would be one more. Weights in int8 take one more read of both, which finds the largest weight of each
block.
"""

import json
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from kernels import instructions_of

from adalomo_jax import adalomo, apply_updates
from adalomo_jax.memory.targets import TARGETS, devices_of, prepare
from adalomo_jax.optimizers.float24 import encode as encode_float24
from adalomo_jax.optimizers.int8 import encode as encode_int8
from adalomo_jax.optimizers.kept import Kept

SHAPE = (4096, 11008)
"""The largest matrix of LLaMA-7B's layers, transposed."""


class Passes(NamedTuple):
    """The passes over one matrix."""

    reads_of_gradient: int
    reads_of_weights: int
    writes: int
    """Writes of whole matrices, including the new weights."""
    bytes_accessed: float | None
    """Bytes per weight, by the compiler's own count."""
    temporaries: float
    """Bytes per weight."""


def passes_of(
    target: str, dtype: Any, key: jax.Array | None = None, encode: Callable[[jax.Array], Kept] | None = None
) -> Passes:
    """AdaLomo's update of one matrix and the write of it, compiled for a chip. ``encode`` gives the weights a form."""
    on = SingleDeviceSharding(devices_of(TARGETS[target])[0])
    placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on)
    tx, g = adalomo(1e-3), placed(jax.ShapeDtypeStruct(SHAPE, dtype))
    theta = jax.tree.map(placed, jax.eval_shape(encode, g)) if encode else g
    state = jax.tree.map(placed, jax.eval_shape(tx.init, g))

    def step(theta, state, g):
        floats = theta.floats() if encode else theta
        updates, state = tx.update(g, state, floats)
        return theta.add(updates, key) if encode else apply_updates(theta, updates, key=key), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(theta, state, g).compile()
    cost: Any = compiled.cost_analysis()
    sizes: Any = compiled.memory_analysis()
    weights = SHAPE[0] * SHAPE[1]
    accessed = cost["bytes accessed"] / weights if cost and "bytes accessed" in cost else None
    return counted(compiled.as_text() or "", accessed, sizes.temp_size_in_bytes / weights)


def counted(text: str, accessed: float | None, temporaries: float) -> Passes:
    """The passes of a compiled step of ``(theta, state, g)``."""
    program = instructions_of(text)
    of = {i.name: i for i in program}

    def origin(name: str) -> str:
        """The kernel or parameter that an array comes from, through all moves."""
        i = of.get(name)
        return origin(i.operands[0]) if i and not i.is_kernel and i.operands else name

    makes_matrix = lambda i: any(a.size == math.prod(SHAPE) for a in i.arrays)
    parameters = [i.name for i in program if i.opcode == "parameter" and makes_matrix(i)]
    gradient = {name for name in parameters if name.startswith("g")}
    theta = {name for name in parameters if name.startswith("theta")}
    assert gradient and theta, parameters
    kernels = [i for i in program if i.is_kernel]
    reads = [{origin(name) for name in i.operands} for i in kernels]
    writes = sum(map(makes_matrix, kernels))
    return Passes(
        sum(map(bool, (r & gradient for r in reads))),
        sum(map(bool, (r & theta for r in reads))),
        writes,
        accessed,
        temporaries,
    )


def main(targets: list[str]) -> None:
    key = jax.random.key(0)
    rows = {
        "float32": (jnp.float32, None, None),
        "bfloat16, to nearest": (jnp.bfloat16, None, None),
        "bfloat16": (jnp.bfloat16, key, None),
        "bf16+8": (jnp.bfloat16, key, encode_float24),
        "int8": (jnp.bfloat16, key, encode_int8),
    }
    for target in targets:
        prepare(TARGETS[target])
        for weights, row in rows.items():
            print(json.dumps({"target": target, "weights": weights} | passes_of(target, *row)._asdict()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
