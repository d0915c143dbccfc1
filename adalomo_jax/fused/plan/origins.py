"""Tells what a function's results are: inputs that it returns unchanged, or values that it makes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from adalomo_jax.fused.plan.jaxpr import Equation, Program, called_by, evaluate, is_checkpoint, scan_of, trace

Origin = int | Equation | None
"""The position of an input, or the equation that made a value; None for a constant or a transposed input."""

_HAND_ON = frozenset("copy copy_p name optimization_barrier reshard sharding_constraint".split())


class Input(NamedTuple):
    """An input, and the order of its axes."""

    position: int
    axes: tuple[int, ...]


def call_with_origins(fn: Callable[..., Any], params: Any, *args: Any) -> tuple[Any, list[Origin]]:
    """``fn(params, *args)``, and the origins of its leaves. The inputs are the leaves of ``params``, then of ``args``.

    ``fn`` is traced once, and then its equations run, so that a trace around this one sees the same as it would from
    ``fn`` itself.
    """
    leaves, treedef = jax.tree.flatten(params)
    program, structure = trace(lambda leaves, *args: fn(treedef.unflatten(leaves), *args), leaves, *args)
    values = dict(program.constants) | dict(zip(program.inputs, [*leaves, *jax.tree.leaves(args)], strict=True))
    evaluate(program.equations, values)
    return structure.unflatten([values[v] for v in program.outputs]), origins(program)


def origins(program: Program) -> list[Origin]:
    """The origins of a program's outputs, through scans, checkpoints and transposes."""
    axes = lambda v: tuple(range(len(program.avals[v].shape)))
    known: dict[int, Input | Equation | None] = {v: Input(i, axes(v)) for i, v in enumerate(program.inputs)}
    for equation in program.equations:
        known.update(zip(equation.outputs, _results(equation, [known.get(v) for v in equation.inputs]), strict=True))
    of_output = lambda x, v: (x.position if x.axes == axes(v) else None) if isinstance(x, Input) else x
    return [of_output(known.get(v), v) for v in program.outputs]


def _results(equation: Equation, operands: Sequence[Input | Equation | None]) -> list[Input | Equation | None]:
    """The origins of an equation's outputs, given those of its inputs."""
    if is_checkpoint(equation):
        return [operands[x] if isinstance(x, int) else x for x in origins(called_by(equation))]
    if equation.name == "scan":
        scan = scan_of(equation)
        is_same = lambda i, x: x == scan.num_consts + i if i < scan.num_carry else x >= scan.first_xs
        of_body = enumerate(origins(scan.body))
        return [(operands[x] if is_same(i, x) else equation) if isinstance(x, int) else x for i, x in of_body]
    if equation.name == "transpose" and isinstance(operands[0], Input):
        position, axes = operands[0]
        return [Input(position, tuple(axes[i] for i in equation.params["permutation"]))]
    return list(operands) if equation.name in _HAND_ON else [equation] * len(equation.outputs)
