"""What a layer without checkpoints saves for the way back, once it is the body of a scan.

Of a loop in Python, XLA saves what it likes: it computes again what is elementwise of something else that is saved.
What a scan saves is an array for all layers, chosen by JAX: of gelu alone six. So here a layer's products, reductions
and the like are saved, and what lies between is computed again. The number of products is the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from adalomo_jax.fused.chain import ELEMENTWISE
from adalomo_jax.fused.jaxpr import Equation, evaluate, is_checkpoint

_OF_LAYOUT = frozenset("broadcast_in_dim copy expand_dims reshape rev squeeze transpose".split())
_OF_FLAGS = frozenset("and eq ge gt is_finite le lt ne not or".split())


def evaluate_layer(equations: Sequence[Equation], values: dict[int, Any], wanted: Iterable[int]) -> None:
    """Runs a layer's equations on ``values``, and adds to it what is wanted.

    Between its checkpoints, and what has effects, it saves what `_is_saved` says.
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
        values |= jax.checkpoint(compute, policy=_is_saved, prevent_cse=False)({v: values[v] for v in read})


def _is_saved(primitive: Any, *avals: Any, **_: Any) -> bool:
    """Whether what a primitive makes is saved, if it is needed again; else it is computed again.

    A flag takes a byte, and random bits are dear.
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
