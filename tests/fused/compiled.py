"""Reads from a compiled program what memory it uses."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flops
import jax
import optax
from found_model import Model

from adalomo_jax import fuse


class Memory(NamedTuple):
    """Bytes of a model's fused step and its unfused twin, both donating parameters and state; and the cast stacks."""

    params_and_state: int
    stacks: int
    """Bytes of the parameters that should be updated layer by layer."""
    updated_in_place: int
    """Bytes of the arguments whose memory the fused step's results reuse."""
    temporaries: int
    temporaries_unfused: int
    narrow_stacks: list[str]
    narrow_stacks_unfused: list[str]

    @property
    def saved(self) -> float:
        """How much smaller the fused step's temporaries are, as a part of the stacks: 1 means all their gradients."""
        return (self.temporaries_unfused - self.temporaries) / self.stacks


class Compiled(NamedTuple):
    """A model's step, fused and unfused; both donate parameters and state."""

    model: Model
    state: Any
    """The state before the first step, not yet placed."""
    fused: Any
    unfused: Any
    flops: tuple[int, int]
    """FLOPs of the products, fused and unfused."""

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
    """Compiles a model's step, fused and unfused, for arguments as ``place`` places them."""
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
    """16-bit arrays with the shape of a float32 stack, its axes in any order: all layers, cast at once.

    A value inside a fusion does not count as an array, but the fusion's result does.
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
