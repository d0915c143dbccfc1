"""Second readers of a stack of layers: if they read one layer at a time, the scan over the layers computes them.

A sum of squares over a stack (a penalty in the loss, or a norm that it returns) reads the stack beside its scan. Then
its part of the gradient is a whole stack, and the stack has to be updated whole. But such a reader looks at each layer
by itself, and adds up the results. So here the scan's body looks at its layer, the scan returns each layer's result,
and the program adds them up after the scan.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from adalomo_jax.fused.plan.chain import arrays_in, axis_of_inputs, is_elementwise, layer_axes, of_one_layer
from adalomo_jax.fused.plan.homes import find_homes
from adalomo_jax.fused.plan.jaxpr import Equation, Program, evaluate, retrace, scan_of

_REDUCTIONS = ("reduce_sum", "reduce_and", "reduce_or", "reduce_max", "reduce_min", "reduce_prod")
_OVER_LAYERS = {"reduce_sum": lax.reduce_sum, "reduce_and": lax.reduce_and, "reduce_or": lax.reduce_or}
"""The reductions that may run within layers first. The gradient of a maximum would change if two values tie."""

_FLAT = -1
"""The layer axis of a stack whose axes were merged into one, in which the layers follow each other."""


@dataclass
class _Reading:
    """What the program computes from single layers of the stacks that a scan runs over."""

    program: Program
    layers: int
    axes: dict[int, int]
    """The layer axis of each value that is computed layer by layer; at first, only of the stacks."""
    stacks: dict[int, frozenset[int]]
    """The stacks that a value is computed from: from one layer, or from all layers if `sums` has it."""
    steps: dict[int, Equation] = field(default_factory=dict)
    """For each value, the equation that makes it for one layer, with its layer axis kept."""
    sums: dict[int, str] = field(default_factory=dict)
    """For each value that reduces its step's results over the layers, the reduction."""
    fills: dict[int, Equation] = field(default_factory=dict)
    """Values that are the same in all entries. They have no layers until an equation combines them with layers."""


def fold_readers(program: Program, leaves: Sequence[int], trained: Sequence[bool]) -> Program:
    """Moves what scans can compute from one layer at a time into them. The program computes the same.

    Args:
      program: the loss.
      leaves: the parameters, which are its first inputs.
      trained: whether each is trained; the others need no gradient, wherever they are read.
    """
    lost = _misplaced(program, leaves, trained)
    scans = [equation for equation in program.equations if equation.name == "scan" and scan_of(equation).length > 0]
    for scan in scans if lost else []:
        folded = _fold_into(program, scan, leaves, {leaves[i] for i in lost})
        if folded is not None and len(_misplaced(folded, folded.inputs[: len(leaves)], trained)) < len(lost):
            return fold_readers(folded, folded.inputs[: len(leaves)], trained)
    return program


def _misplaced(program: Program, leaves: Sequence[int], trained: Sequence[bool]) -> list[int]:
    homes, _ = find_homes(program, leaves)
    return [i for i, home in enumerate(homes) if trained[i] and home.misplaced]


def _fold_into(program: Program, scan: Equation, leaves: Sequence[int], lost: Collection[int]) -> Program | None:
    """The program in which a scan has taken in the readers of lost leaves; None if there are none to take in."""
    axes = layer_axes(program, scan, scan.inputs[scan_of(scan).first_xs :])
    run_over = {v: axes[v] for v in leaves if v in axes}
    reading = _read(program, scan, run_over)
    before = _needed_for(program, scan)
    moved, kept_out = {v for v in reading.sums if v not in before}, set(leaves).intersection(program.outputs)
    for v in reading.sums.keys() & before:
        kept_out |= reading.stacks[v]
    for equation in program.equations:
        if equation is scan or any(v in reading.steps for v in equation.outputs):
            continue
        for v in [v for v in equation.inputs if v in reading.axes and reading.stacks[v]]:
            is_small = all(program.avals[v].size < program.avals[stack].size for stack in reading.stacks[v])
            if is_small and not before.intersection(equation.outputs):
                moved.add(v)
            else:
                kept_out |= reading.stacks[v]
    moved |= {v for v in program.outputs if v in reading.steps and v in reading.axes}
    taken_in = set(lost) & run_over.keys() - kept_out
    moved = {v for v in moved if v in reading.steps and reading.stacks[v] & taken_in}
    if not moved or _reorders_effects(program, scan, moved, reading):
        return None
    return retrace(program, lambda values: _run(program, scan, reading, moved, values), len(leaves))


def _read(program: Program, scan: Equation, run_over: dict[int, int]) -> _Reading:
    """Follows the stacks forward, as long as the equations act on each layer alone."""
    reading = _Reading(program, scan_of(scan).length, dict(run_over), {v: frozenset([v]) for v in run_over})
    for equation in program.equations:
        scalars = [v for v in equation.inputs if not program.avals[v].ndim]
        if equation is scan or len(equation.outputs) != 1 or any(v not in program.constants for v in scalars):
            continue
        made, arrays = equation.outputs[0], arrays_in(program, equation)
        if all(v in reading.fills for v in arrays) and (is_elementwise(equation) or not arrays):
            if equation.name == "broadcast_in_dim" or arrays:
                reading.fills[made] = equation
            continue
        layered = [v for v in arrays if v in reading.axes and v not in reading.sums]
        if not layered or any(v not in reading.axes and v not in reading.fills for v in arrays):
            continue
        axis, reduction = _axis_made(reading, equation, arrays)
        if reduction is not None:
            reading.sums[made] = reduction
        elif axis is None or not all(_claim(reading, v, axis) for v in arrays if v in reading.fills):
            continue
        else:
            reading.axes[made] = axis
        reading.steps[made] = _of_one_layer(reading, equation, axis)
        reading.stacks[made] = frozenset().union(*(reading.stacks[v] for v in arrays))
    return reading


def _axis_made(reading: _Reading, equation: Equation, arrays: Sequence[int]) -> tuple[int | None, str | None]:
    """The layer axis of an equation's result, or the reduction over layers that it is; otherwise None twice."""
    avals, params, made = reading.program.avals, equation.params, reading.program.avals[equation.outputs[0]]
    axes = [reading.axes[v] for v in arrays if v in reading.axes]
    axis = axes[0]
    if is_elementwise(equation):
        alike = len(set(axes)) == 1 and all(
            avals[v].ndim == made.ndim and avals[v].shape[axis] == made.shape[axis] for v in arrays
        )
        return (axis if alike else None), None
    if equation.name in _REDUCTIONS and len(arrays) == 1:
        if axis == _FLAT or axis in params["axes"]:
            return None, equation.name if equation.name in _OVER_LAYERS else None
        return axis - sum(a < axis for a in params["axes"]), None
    if equation.name == "dot_general" and len(axes) == len(equation.inputs) == 2:
        contracted, batch = (list(zip(*pairs)) for pairs in params["dimension_numbers"])
        pair = tuple(a % avals[v].ndim for v, a in zip(equation.inputs, axes))
        if pair in contracted:
            return None, "reduce_sum"
        return (batch.index(pair) if pair in batch and _FLAT not in axes else None), None
    if len(arrays) != 1 or axis == _FLAT:
        return None, None
    found = [a for a in range(made.ndim) if axis_of_inputs(reading.program, equation, a) == axis]
    if len(found) == 1 and made.shape[found[0]] == reading.layers:
        return found[0], None
    is_flattened = equation.name == "reshape" and axis == 0 and made.ndim == 1 and params.get("dimensions") is None
    return (_FLAT if is_flattened else None), None


def _claim(reading: _Reading, fill: int, axis: int) -> bool:
    """Gives a value that is the same in all entries this layer axis. Returns whether it has no other."""
    if fill not in reading.axes:
        equation = reading.fills[fill]
        if not all(_claim(reading, v, axis) for v in arrays_in(reading.program, equation)):
            return False
        reading.axes[fill], reading.stacks[fill] = axis, frozenset()
        reading.steps[fill] = _of_one_layer(reading, equation, axis)
    return reading.axes[fill] == axis


def _of_one_layer(reading: _Reading, equation: Equation, axis: int | None) -> Equation:
    """The equation, applied to one layer; a reduction over layers becomes one over an axis of size 1."""
    if axis is None:
        return equation
    if axis != _FLAT:
        return of_one_layer(equation, {equation.outputs[0]: axis})
    size = (reading.program.avals[equation.outputs[0]].size // reading.layers,)
    sizes = {"reshape": {"new_sizes": size}, "broadcast_in_dim": {"shape": size}}
    return equation.with_params(**sizes.get(equation.name, {}))


def _needed_for(program: Program, scan: Equation) -> set[int]:
    """The values that a scan depends on."""
    needed = set(scan.inputs)
    before = program.equations[: next(i for i, e in enumerate(program.equations) if e is scan)]
    for equation in reversed(before):
        if needed.intersection(equation.outputs):
            needed.update(equation.inputs)
    return needed


def _waiting(program: Program, scan: Equation, moved: Collection[int], reading: _Reading) -> list[Equation]:
    """The equations before the scan that need a value that it will compute, except those that compute from layers."""
    late, waiting = set(moved), []
    for equation in program.equations[: next(i for i, e in enumerate(program.equations) if e is scan)]:
        if late.intersection(equation.inputs) and not any(v in reading.steps for v in equation.outputs):
            late.update(equation.outputs)
            waiting.append(equation)
    return waiting


def _reorders_effects(program: Program, scan: Equation, moved: Collection[int], reading: _Reading) -> bool:
    """Whether equations with effects would change their order."""
    waiting = {id(equation) for equation in _waiting(program, scan, moved, reading)}
    passed = False
    for equation in program.equations[: next(i for i, e in enumerate(program.equations) if e is scan) + 1]:
        if equation.has_effects and passed and id(equation) not in waiting:
            return True
        passed |= equation.has_effects and id(equation) in waiting
    return False


def _run(program: Program, scan: Equation, reading: _Reading, moved: set[int], values: dict[int, Any]) -> list[Any]:
    """The program's outputs, given its inputs and constants."""
    waiting = _waiting(program, scan, moved, reading)
    done = {id(scan), *map(id, waiting)}
    for equation in program.equations:
        if equation is scan:
            values |= _run_scan(program, scan, reading, moved, values)
            evaluate(waiting, values)
            done |= {id(e) for e in program.equations if moved.issuperset(e.outputs) and e.outputs}
        elif id(equation) not in done:
            evaluate([equation], values)
    return [values[v] for v in program.outputs]


def _run_scan(
    program: Program, equation: Equation, reading: _Reading, moved: Collection[int], values: dict[int, Any]
) -> dict[int, Any]:
    """The scan's outputs, and the values that it computed from all layers."""
    scan = scan_of(equation)
    operands = [values[v] for v in equation.inputs]
    consts, carry = operands[: scan.num_consts], operands[scan.num_consts : scan.first_xs]
    steps, stacks = _steps_to(program, reading, moved)
    layers = [jnp.moveaxis(values[v], reading.axes[v], 0) for v in stacks]

    # Otherwise residuals as large as the layer would be saved; the backward pass has the layer again anyway.
    @jax.checkpoint
    def read(layers: list[Any]) -> list[Any]:
        kept = [jnp.expand_dims(layer, reading.axes[v]) for v, layer in zip(stacks, layers)]
        found = {**program.constants, **dict(zip(stacks, kept))}
        evaluate(steps, found)
        whole = lambda v: v in reading.sums or reading.axes[v] == _FLAT
        return [found[v] if whole(v) else jnp.squeeze(found[v], reading.axes[v]) for v in sorted(moved)]

    def body(carry: list[Any], xs_and_layers: tuple[list[Any], list[Any]]) -> tuple[list[Any], Any]:
        xs, layers = xs_and_layers
        inner = {**scan.body.constants, **dict(zip(scan.body.inputs, [*consts, *carry, *xs]))}
        evaluate(scan.body.equations, inner)
        outputs = [inner[v] for v in scan.body.outputs]
        return outputs[: scan.num_carry], (outputs[scan.num_carry :], read(layers))

    carry, (ys, found) = lax.scan(
        body, carry, (operands[scan.first_xs :], layers), length=scan.length, reverse=scan.reverse, unroll=scan.unroll
    )
    of_all = {
        v: _OVER_LAYERS[reading.sums[v]](x, (0,)) if v in reading.sums else jnp.moveaxis(x, 0, reading.axes[v])
        for v, x in zip(sorted(moved), found)
    }
    return {**dict(zip(equation.outputs, [*carry, *ys])), **of_all}


def _steps_to(program: Program, reading: _Reading, moved: Collection[int]) -> tuple[list[Equation], list[int]]:
    """The steps that make these values for one layer, in the program's order, and the stacks that they start from."""
    needed, steps = set(moved), []
    for equation in reversed(program.equations):
        step = reading.steps.get(equation.outputs[0]) if len(equation.outputs) == 1 else None
        if step is not None and needed.intersection(step.outputs):
            needed.update(step.inputs)
            steps.append(step)
    return steps[::-1], sorted(v for v in needed if reading.stacks.get(v) == frozenset([v]))
