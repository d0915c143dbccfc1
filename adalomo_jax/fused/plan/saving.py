"""Chooses the residuals of layers without checkpoints, once they are the body of a scan.

In a Python loop, XLA chooses them: it computes elementwise functions of other saved values again. In a scan, JAX
chooses them, and each is an array for all layers: gelu alone has six. So here a layer's products, reductions and the
like are saved, and the operations between them are computed again. The number of products is the same.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adalomo_jax.fused.plan.chain import ELEMENTWISE
from adalomo_jax.fused.plan.jaxpr import Equation, Program, evaluate, is_checkpoint
from adalomo_jax.fused.plan.repeats import Repeat
from adalomo_jax.fused.plan.runs import bytes_handed, nbytes

_OF_LAYOUT = frozenset("broadcast_in_dim copy expand_dims reshape rev squeeze transpose".split())
_OF_FLAGS = frozenset("and eq ge gt is_finite le lt ne not or".split())
_CHEAP = _OF_LAYOUT | ELEMENTWISE | {"convert_element_type"}


def evaluate_layer(
    program: Program,
    repeat: Repeat,
    equations: Sequence[Equation],
    parameters: Collection[int],
    values: dict[int, Any],
    stacked: Collection[int],
) -> None:
    """Runs a layer's equations on ``values``, and adds the carried and the stacked values to it.

    Equations with neither checkpoint nor effects are put under a checkpoint that saves what `_is_saved` says. If the
    layer is a period of several with matrices of the same shapes, each of those has its own checkpoint: so each is
    pulled back by itself, and its weights are updated before the backward pass goes on to the one before. Values made
    from ``parameters`` alone, such as a cast of the layer's weights, are made again in each part that reads them,
    because a checkpoint saves its inputs.
    """
    wanted = {*stacked, *(c.made for c in repeat.carried)}
    again = _made_again(equations, parameters, wanted)
    of_again = {v for equation in again for v in equation.outputs}
    parts = [[e for e in run if of_again.isdisjoint(e.outputs)] for run in _runs(program, repeat, equations)]
    runs = [_with_what_it_reads(part, again) for part in parts if part]
    for k, run in enumerate(runs):
        stands_alone = _stands_alone(run[-1])
        if stands_alone and (len(run) == 1 or run[-1].has_effects):
            evaluate(run, values)
            continue
        later = {v for others in runs[k + 1 :] for equation in others for v in equation.inputs} | wanted
        outputs = [v for equation in run for v in equation.outputs if v in later and v not in of_again]
        read = dict.fromkeys(v for equation in run for v in equation.inputs if isinstance(values.get(v), Tracer))
        compute = _computing(run, values, outputs)
        policy = None if stands_alone else _is_saved
        values |= jax.checkpoint(compute, policy=policy, prevent_cse=False)({v: values[v] for v in read})


def _made_again(equations: Sequence[Equation], parameters: Collection[int], wanted: set[int]) -> list[Equation]:
    """The cheap equations that read only parameters, or the results of other such equations."""
    known, again = set(parameters).difference(v for equation in equations for v in equation.outputs), []
    for equation in equations:
        is_cheap = equation.name in _CHEAP and not equation.has_effects
        if is_cheap and known.issuperset(equation.inputs) and wanted.isdisjoint(equation.outputs):
            known.update(equation.outputs)
            again.append(equation)
    return again


def _with_what_it_reads(run: list[Equation], again: Sequence[Equation]) -> list[Equation]:
    """The run, after those of the other equations that it needs."""
    read, needed = {v for equation in run for v in equation.inputs}, []
    for equation in reversed(again):
        if read.intersection(equation.outputs):
            read.update(equation.inputs)
            needed.append(equation)
    return [*reversed(needed), *run]


def _is_saved(primitive: Any, *avals: Any, **_: Any) -> bool:
    """Whether a primitive's results are saved if they are needed again; otherwise they are computed again.

    A flag takes a byte, and random bits are expensive.
    """
    is_float = any(jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals)
    again = primitive.name in _OF_LAYOUT or (primitive.name in ELEMENTWISE - _OF_FLAGS and is_float)
    return not (again or primitive.name == "convert_element_type")


def _computing(run: Sequence[Equation], values: dict[int, Any], outputs: Sequence[int]) -> Callable[..., Any]:
    def compute(read: dict[int, Any]) -> dict[int, Any]:
        inner = values | read
        evaluate(run, inner)
        return {v: inner[v] for v in outputs}

    return compute


def _runs(program: Program, repeat: Repeat, equations: Sequence[Equation]) -> Iterator[list[Equation]]:
    """Cuts around equations that stand alone, and after each of several layers if no more is handed on there."""
    shapes = {s.received: program.avals[s.values[0]].shape for s in repeat.scanned if s.is_parameter}
    matrices = {v: shape for v, shape in shapes.items() if len(shape) > 1}
    of_all, of_run, run = Counter(matrices.values()), dict[int, Any](), list[Equation]()
    several = math.gcd(*of_all.values()) if of_all else 1
    of_one = Counter({shape: n // several for shape, n in of_all.items()})
    handed = _bytes_handed(program, repeat, equations)
    for k, equation in enumerate(equations):
        is_next = several > 1 and Counter(of_run.values()) == of_one and handed[k] <= handed[0]
        if run and (is_next or _stands_alone(equation) or _stands_alone(run[-1])):
            yield run
            run, of_run = [], {}
        run.append(equation)
        of_run |= {v: matrices[v] for v in equation.inputs if v in matrices}
    if run:
        yield run


def _bytes_handed(program: Program, repeat: Repeat, equations: Sequence[Equation]) -> np.ndarray:
    """The bytes that are carried, or made, before each equation, and read by it or after it."""
    last_read = {v: k for k, equation in enumerate(equations) for v in equation.inputs}
    last_read |= {c.made: len(equations) for c in repeat.carried}
    carried = {c.received: nbytes(program, c.made) for c in repeat.carried}
    made = [(k, v) for k, equation in enumerate(equations) for v in equation.outputs]
    spans = [(-1, last_read.get(v, -1), size) for v, size in carried.items()]
    return bytes_handed([*spans, *((k, last_read.get(v, -1), nbytes(program, v)) for k, v in made)], len(equations))


def _stands_alone(equation: Equation) -> bool:
    return is_checkpoint(equation) or equation.has_effects
