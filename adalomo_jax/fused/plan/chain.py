"""Operations on a stack of layers that act on each layer alone: casts, transposes and the like before a scan.

`chain_to` follows them back from the scan, which runs over the first axis, to the parameters, whose layers may be on
another. One layer keeps its layer axis, of size 1, so that most operations apply to it unchanged.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from adalomo_jax.fused.plan.jaxpr import Equation, Program

ELEMENTWISE = frozenset(
    "abs acos add and asin atan atan2 cbrt ceil clamp convert_element_type copy copy_p cos cosh div eq erf erfc".split()
    + "exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p log2 logistic lt max min mul ne neg".split()
    + "not one_minus_square or pow reduce_precision rem round rsqrt select_n".split()
    + "sign sin sinh sqrt square sub tan tanh".split()
)
"""Primitives that compute each entry from the entries at its position, and from scalars."""


class Chain(NamedTuple):
    """The operations between stacked parameters and the scan that runs over them."""

    axes: dict[int, int]
    """The layer axis of each parameter, by its number."""
    equations: tuple[Equation, ...]
    """The operations in the program, in its order."""
    of_one_layer: tuple[Equation, ...]
    """The same operations on one layer, with its layer axis kept."""


def chain_to(program: Program, scan: Equation, num_xs: int, leaves: Sequence[int]) -> Chain:
    """The operations that lead leaves, layer by layer, into the last ``num_xs`` inputs of a scan and nowhere else."""
    xs, others = scan.inputs[len(scan.inputs) - num_xs :], scan.inputs[: len(scan.inputs) - num_xs]
    axes = layer_axes(program, scan, xs)
    equations = [e for e in program.equations if len(e.outputs) == 1 and e.outputs[0] in axes]
    values = {v for v in leaves if v in axes} | {e.outputs[0] for e in equations}
    values = values.difference(program.outputs, others)
    readers = defaultdict(list)
    for equation in program.equations:
        for v in equation.inputs:
            readers[v].append(equation)
    while True:
        equations = [e for e in equations if values.issuperset({*arrays_in(program, e), *e.outputs})]
        within = {id(scan), *map(id, equations)}
        made = {*leaves, *(e.outputs[0] for e in equations)}
        sound = {v for v in values & made if all(id(reader) in within for reader in readers[v])}
        if sound == values:
            break
        values = sound
    return Chain(
        axes={v: axes[v] for v in leaves if v in values},
        equations=tuple(equations),
        of_one_layer=tuple(of_one_layer(e, axes) for e in equations),
    )


def layer_axes(program: Program, scan: Equation, xs: Sequence[int]) -> dict[int, int]:
    """The layer axis of each value from which operations on single layers may lead into ``xs``."""
    axes, at_odds = dict.fromkeys(xs, 0), set()
    before = program.equations[: next(i for i, e in enumerate(program.equations) if e is scan)]
    for equation in reversed(before):
        made = equation.outputs[0] if len(equation.outputs) == 1 else None
        axis = axis_of_inputs(program, equation, axes[made]) if made in axes else None
        if axis is None:
            axes = {v: a for v, a in axes.items() if v not in equation.outputs}
            continue
        for v in arrays_in(program, equation):
            if axes.setdefault(v, axis) != axis:
                at_odds.add(v)
    return {v: axis for v, axis in axes.items() if v not in at_odds}


def is_elementwise(equation: Equation) -> bool:
    """Whether the equation computes each entry from the entries at its position, and from scalars."""
    return equation.name in ELEMENTWISE


def arrays_in(program: Program, equation: Equation) -> list[int]:
    """The inputs that have axes."""
    return [v for v in equation.inputs if program.avals[v].ndim]


def axis_of_inputs(program: Program, equation: Equation, axis: int) -> int | None:
    """The layer axis of an operation's inputs, given that of its output; None if it does not act on each layer."""
    operands, params = [program.avals[v] for v in equation.inputs], equation.params
    if not operands or any(not operands[i].ndim and v not in program.constants for i, v in enumerate(equation.inputs)):
        return None
    shape, shape_in = program.avals[equation.outputs[0]].shape, operands[0].shape
    if is_elementwise(equation):
        # Operands of one rank may broadcast sizes of 1, but not on the layer axis.
        same = (not x.ndim or (x.ndim == len(shape) and x.shape[axis] == shape[axis]) for x in operands)
        return axis if all(same) else None
    if equation.name == "transpose":
        return params["permutation"][axis]
    if equation.name == "reshape" and params.get("dimensions") is None:
        before = math.prod(shape[:axis])
        same = [a for a, n in enumerate(shape_in) if n == shape[axis] and math.prod(shape_in[:a]) == before]
        return same[0] if len(same) == 1 else None
    if equation.name == "squeeze":
        return [a for a in range(len(shape_in)) if a not in params["dimensions"]][axis]
    if equation.name == "broadcast_in_dim" and axis in params["broadcast_dimensions"] and len(operands) == 1:
        before = params["broadcast_dimensions"].index(axis)
        return before if shape_in[before] == shape[axis] else None
    if equation.name == "slice" and shape_in[axis] == shape[axis]:
        return axis
    return None


def of_one_layer(equation: Equation, axes: Mapping[int, int]) -> Equation:
    """The operation on one layer, with its layer axis kept."""
    made = equation.outputs[0]
    one = lambda sizes: tuple(1 if a == axes[made] else n for a, n in enumerate(sizes))
    if equation.name == "reshape":
        return equation.with_params(new_sizes=one(equation.params["new_sizes"]))
    if equation.name == "broadcast_in_dim":
        return equation.with_params(shape=one(equation.params["shape"]))
    if equation.name == "slice":
        return equation.with_params(limit_indices=one(equation.params["limit_indices"]))
    return equation
