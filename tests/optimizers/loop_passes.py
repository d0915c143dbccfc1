"""Prints how often the update passes over a layer's matrices in the fused step, as chips' compilers write it.

    python tests/optimizers/loop_passes.py tpu-v5e h100 rtx-4090

The step is AdaLomo's for a LLaMA-7B with four layers. The chips need not be present. The script counts the kernels in
the body of the loop that pulls layers back and updates them. It leaves out the model's own matrix products, which read
the weights and make the gradients. The least is three reads of a gradient, as in adalomo_jax/optimizers/moments.py, or
two if the product that makes it takes the first sums on the way; two reads of the weights, the first of which also cuts
the layer out of its stack; and one write. JAX cannot read what libtpu 0.0.52 compiles for TPUs other than v5e.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding
from kernels import Instruction, instructions_of

from adalomo_jax import adalomo, fuse
from adalomo_jax.memory.targets import TARGETS, devices_of, prepare
from adalomo_jax.models import PRESETS, Decoder, next_token_loss
from adalomo_jax.models.attention import kind_for

LAYERS = 4
TOKENS = 1536
"""A multiple of the length that the attention kernel takes, so that no activation has as many entries as a matrix."""
PRODUCTS = {"dot", "convolution", "__cublas$gemm", "__cublas$lt$matmul"}
WIDE = {"f32", "s32", "u32"}

Value = tuple[str, int]
"""An array: the instruction that makes it, and which of its results."""


class Step(NamedTuple):
    """A compiled training step."""

    text: str
    stacks: list[jax.ShapeDtypeStruct]
    """Its parameters that are stacks of matrices."""
    others: list[jax.ShapeDtypeStruct]
    """Its other matrices."""


class Passes(NamedTuple):
    """The most passes over any matrix of a layer, and copies, of which the whole program should have none."""

    reads_of_gradient: float
    reads_of_weights: int
    writes_of_weights: int
    stacks_copied: list[str]
    """Instructions that make an array of a stack's size without updating one in place."""
    wide_copies: list[str]
    """Instructions that make a 32-bit array of the size of a 16-bit parameter, or of one of its layers."""


def compile_step(target: str, dtype: Any) -> Step:
    """Compiles the step for a chip."""
    model = dataclasses.replace(PRESETS["llama-2-7b"], num_hidden_layers=LAYERS)
    attention = kind_for(TARGETS[target].platform, TOKENS, model.head_dim, jnp.dtype(dtype))
    make_model = lambda: Decoder(model, rngs=nnx.Rngs(0), dtype=dtype, attention=attention)
    graphdef, params = nnx.split(nnx.eval_shape(make_model))
    params = nnx.to_pure_dict(params)
    step = fuse(lambda params, tokens: next_token_loss(nnx.merge(graphdef, params), tokens), adalomo(1e-3))
    tokens = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    on = SingleDeviceSharding(devices_of(TARGETS[target])[0])
    args = (params, step.abstract_state(params, tokens), tokens)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), args)
    leaves = jax.tree.leaves(params)
    stacks = [x for x in leaves if x.ndim == 3]
    others = [x for x in leaves if x.ndim == 2 and x.shape[0] != LAYERS]
    return Step(step.jit.lower(*placed).compile().as_text() or "", stacks, others)


def passes_of(step: Step) -> Passes:
    """The passes of a compiled step."""
    program = instructions_of(step.text)
    body = Body(program, {x.shape for x in step.stacks})
    sizes = {x.size // LAYERS for x in step.stacks}
    cuts = {stack: body.readers(stack) for stack in body.stacks}
    layers = {cut for kernels in cuts.values() for cut in body.results(kernels, sizes)}
    read = lambda value: sum(not kernel.contains & PRODUCTS for kernel in body.readers(value))
    makers = [i for i in program if i.is_kernel or i.opcode in ("copy-start", "slice-start")]
    of_stack = {x.size for x in step.stacks}
    narrow = {size for x in step.stacks if x.dtype.itemsize == 2 for size in (x.size, x.size // LAYERS)}
    narrow |= {x.size for x in step.others if x.dtype.itemsize == 2}
    return Passes(
        reads_of_gradient=max(len(body.readers(value)) / count for value, count in body.gradients(sizes).items()),
        reads_of_weights=max(map(read, body.stacks)) + max(map(read, layers), default=0),
        writes_of_weights=max(len(body.writers_of(stack)) for stack in body.stacks),
        stacks_copied=[
            i.name
            for i in makers
            if "dynamic-update-slice" not in i.contains and any(a.size in of_stack for a in i.arrays)
        ],
        wide_copies=[i.name for i in makers if any(a.size in narrow and a.dtype in WIDE for a in i.arrays)],
    )


class Body:
    """The loop that updates stacks of these shapes in place: the computation that does so most often."""

    def __init__(self, program: list[Instruction], shapes: set[tuple[int, ...]]):
        writers = [
            i for i in program if "dynamic-update-slice" in i.contains and any(a.shape in shapes for a in i.arrays)
        ]
        names = [i.computation for i in writers]
        name = max(names, key=names.count)
        self.instructions = {i.name: i for i in program if i.computation == name}
        self.kernels = [i for i in self.instructions.values() if i.is_kernel]
        self.writers = [i for i in writers if i.computation == name]
        given = {self.origin(operand) for i in self.writers for operand in i.operands}
        self.stacks = {v for v in given if self.shape(v) in shapes}

    def origin(self, name: str, index: int = 0) -> Value:
        """The array before any moves: a kernel's result, or an entry of the loop's carry."""
        i = self.instructions[name]
        if i.is_kernel or not i.operands:
            return name, index
        if i.opcode == "tuple":
            return self.origin(i.operands[index])
        return self.origin(i.operands[0], index if i.index is None else i.index)

    def shape(self, value: Value) -> tuple[int, ...]:
        return self.instructions[value[0]].arrays[value[1]].shape

    def writers_of(self, value: Value) -> list[Instruction]:
        """The kernels that update an array in place."""
        writes = lambda i: any(a.shape == self.shape(value) for a in i.arrays)
        return [i for i in self.writers if writes(i) and value in map(self.origin, i.operands)]

    def readers(self, value: Value) -> list[Instruction]:
        """The kernels that read an array, except those that update it in place."""
        return [i for i in self.kernels if value in map(self.origin, i.operands) and i not in self.writers_of(value)]

    def results(self, kernels: Iterable[Instruction], sizes: set[int]) -> list[Value]:
        """The kernels' results that have one of these numbers of entries."""
        return [(i.name, n) for i in kernels for n, a in enumerate(i.arrays) if a.size in sizes]

    def gradients(self, sizes: set[int]) -> dict[Value, int]:
        """Matrix products of the size of a layer's matrices, and how many each joins: a compiler may join some."""
        made = {(i.name, n): a.size for i in self.kernels if i.contains & PRODUCTS for n, a in enumerate(i.arrays)}
        counts = {value: next((k for k in (1, 2, 3) if size / k in sizes), 0) for value, size in made.items()}
        return {value: count for value, count in counts.items() if count}


def main(targets: list[str]) -> None:
    for target in targets:
        prepare(TARGETS[target])
        for dtype in (jnp.float32, jnp.bfloat16):
            found = passes_of(compile_step(target, dtype))
            print(json.dumps({"target": target, "dtype": jnp.dtype(dtype).name} | found._asdict()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
