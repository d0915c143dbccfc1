"""The equations between layer scans, run forward and pulled back as one."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax

from adalomo_jax.fused.jaxpr import Program, evaluate
from adalomo_jax.fused.plan import Segment


class Tape(NamedTuple):
    """What pulling a segment back needs."""

    pullback: Any
    """From cotangents of the active outputs to those of the active inputs, both by number."""
    outputs: tuple[int, ...]
    """The active outputs."""


def forward(stage: Segment, values: dict[int, Any], active: Collection[int]) -> Tape:
    """Runs the segment on the program's ``values``, adds its results to them, and returns the tape."""
    read = {v: values[v] for v in stage.inputs}

    def run(active_inputs: dict[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
        inner = read | active_inputs
        evaluate(stage.equations, inner)
        made = {v: inner[v] for v in stage.outputs}
        return {v: x for v, x in made.items() if v in active}, {v: x for v, x in made.items() if v not in active}

    outputs, pullback, passive = jax.vjp(run, {v: x for v, x in read.items() if v in active}, has_aux=True)
    values.update(outputs | passive)
    return Tape(pullback, tuple(outputs))


def backward(tape: Tape, program: Program, cotangents: Mapping[int, Any]) -> list[tuple[int, Any]]:
    """Pairs of a value that the segment reads and a cotangent of it."""
    if not any(v in cotangents for v in tape.outputs):
        return []
    (d_inputs,) = tape.pullback({v: cotangents[v] if v in cotangents else program.zeros(v) for v in tape.outputs})
    return list(d_inputs.items())
