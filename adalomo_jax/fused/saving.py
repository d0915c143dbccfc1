"""What a layer without checkpoints saves for the way back, once it is the body of a scan.

Of a loop in Python, XLA saves what it likes: it computes again what is elementwise of something else that is saved.
What a scan saves is an array for all layers, chosen by JAX: of gelu alone six. So here a layer's products, reductions
and the like are saved, and what lies between is computed again. The number of products is the same.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.core import Tracer

from adalomo_jax.fused.chain import ELEMENTWISE
from adalomo_jax.fused.jaxpr import Equation, evaluate, is_checkpoint, primitives_of

_COMPARISONS = frozenset("eq ge gt le lt ne".split())
_SHAPES = frozenset(
    "broadcast_in_dim concatenate expand_dims iota pad reshape rev slice split squeeze transpose unstack".split()
)
_RANDOM = frozenset(
    "random_bits random_fold_in random_seed random_split random_unwrap random_wrap threefry2x32".split()
    + "bitcast_convert_type shift_left shift_right_logical xor".split()
)


def evaluate_layer(equations: Sequence[Equation], values: dict[int, Any], wanted: Iterable[int]) -> None:
    """Runs a layer's equations on ``values``, and adds to it what is wanted.

    Between its checkpoints, and what has effects, it saves what `is_saved` says.
    """
    runs = list(_runs(equations))
    for k, run in enumerate(runs):
        if _stands_alone(run[0]):
            evaluate(run, values)
            continue
        later = {v for others in runs[k + 1 :] for equation in others for v in equation.inputs}.union(wanted)
        outputs = [v for equation in run for v in equation.outputs if v in later]
        read = dict.fromkeys(v for equation in run for v in equation.inputs if isinstance(values.get(v), Tracer))
        compute = _computing(run, values, outputs)
        values |= jax.checkpoint(compute, policy=is_saved(run), prevent_cse=False)({v: values[v] for v in read})


def is_saved(equations: Iterable[Equation]) -> Callable[..., bool]:
    """A policy for ``jax.checkpoint``: whether what a primitive makes is saved.

    Of random bits, which are as large as what they are compared with, the comparison is saved, a byte for each; else no
    comparison, since what is compared is.
    """
    draws = not primitives_of(equations).isdisjoint({"random_bits", "threefry2x32"})
    again: Collection[str] = ELEMENTWISE | _SHAPES
    again = (again | _RANDOM) - _COMPARISONS if draws else again
    return lambda primitive, *_, **__: primitive.name not in again


def _computing(run: Sequence[Equation], values: dict[int, Any], outputs: Sequence[int]) -> Callable[..., Any]:
    def compute(read: dict[int, Any]) -> dict[int, Any]:
        inner = values | read
        evaluate(run, inner)
        return {v: inner[v] for v in outputs}

    return compute


def _runs(equations: Iterable[Equation]) -> Iterator[list[Equation]]:
    """Cut before and after each that stands alone."""
    run: list[Equation] = []
    for equation in equations:
        if run and (_stands_alone(equation) or _stands_alone(run[-1])):
            yield run
            run = []
        run.append(equation)
    if run:
        yield run


def _stands_alone(equation: Equation) -> bool:
    return is_checkpoint(equation) or equation.has_effects
