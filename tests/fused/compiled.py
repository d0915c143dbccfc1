"""What a compiled program says of its memory."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flops
import jax
import optax
from found_model import Model

from adalomo_jax import fuse


class Memory(NamedTuple):
    """Bytes of a model's fused step, donating parameters and state, and of its unfused twin; and what was cast."""

    params_and_state: int
    stacks: int
    """Of the parameters that one expects to be updated layer by layer."""
    updated_in_place: int
    """The arguments that results share their memory with, fused."""
    temporaries: int
    temporaries_unfused: int
    narrow_stacks: list[str]
    narrow_stacks_unfused: list[str]

    @property
    def saved(self) -> float:
        """How much smaller the fused step's temporaries are, as a part of the stacks: 1 is all of their gradients."""
        return (self.temporaries_unfused - self.temporaries) / self.stacks


class Compiled(NamedTuple):
    """A model's step, fused and unfused, each donating parameters and state."""

    model: Model
    state: Any
    """Before the first step, for where the arguments are placed."""
    fused: Any
    unfused: Any
    flops: tuple[int, int]
    """Of the products in each."""

    @property
    def memory(self) -> Memory:
        fused, unfused, stacks = self.fused, self.unfused, self.model.stacks
        return Memory(
            params_and_state=tree_bytes((self.model.params, self.state)),
            stacks=tree_bytes(stacks),
            updated_in_place=memory_of(fused).alias_size_in_bytes,
            temporaries=memory_of(fused).temp_size_in_bytes,
            temporaries_unfused=memory_of(unfused).temp_size_in_bytes,
            narrow_stacks=narrow_stacks(fused, stacks),
            narrow_stacks_unfused=narrow_stacks(unfused, stacks),
        )


def compile_steps(
    model: Model, tx: optax.GradientTransformation, place: Callable[[Any], Any] = lambda args: args
) -> Compiled:
    """Compiles a model's step, fused and unfused, for where ``place`` puts the arguments."""
    step = fuse(model.loss_fn, tx, has_aux=model.has_aux)
    args = model.batch(0)
    state = jax.jit(step.init)(model.params, *args)
    args = place((model.params, state, *args))
    traced = [jitted.trace(*args) for jitted in (step.jit.jitted, jax.jit(step.unfused, donate_argnums=(0, 1)))]
    fused, unfused = (program.lower().compile() for program in traced)
    fused_flops, unfused_flops = (flops.of_jaxpr(program.jaxpr.jaxpr) for program in traced)
    return Compiled(model, state, fused, unfused, (fused_flops, unfused_flops))


def tree_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory_of(compiled):
    sizes = compiled.memory_analysis()
    assert sizes is not None
    return sizes


def copies_of_stacks(compiled, stacks):
    """Copies, anywhere in the program, of arrays with the shape of a stack."""
    shapes = {",".join(map(str, x.shape)) for x in jax.tree.leaves(stacks)}
    found = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", compiled.as_text())
    return [shape for shape in found if shape in shapes]


def narrow_stacks(compiled, stacks):
    """Arrays of 16 bits of the shape of a float32 stack, its axes in any order: all layers, cast at once.

    What a fusion computes on its way is no array; what it makes is one.
    """
    shapes = [sorted(x.shape) for x in jax.tree.leaves(stacks) if x.dtype == "float32"]
    text = compiled.as_text()
    fusions = set(re.findall(r" fusion\(.*calls=%?([\w.-]+)", text))
    found, computation = [], ""
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(", line)):
            computation = head[1]
        array = re.search(r" = ((?:bf|f)16\[([\d,]+)\])", line)
        if array and computation not in fusions and sorted(map(int, array[2].split(","))) in shapes:
            found.append(array[1])
    return found
