"""Makes what a checkpoint folds into its keys one of its operands: layers differ in that, not in what they run.

Linen makes the key of a layer's dropout within the layer, from a number that stands for the layer's name.
"""

from typing import Any

import jax

from adalomo_jax.fused.plan.jaxpr import Equation, Program, called_by, evaluate, is_checkpoint, trace


def with_folded_as_operands(program: Program) -> Program:
    """A program that computes the same, but passes to its checkpoints the constants that they fold into keys."""
    avals, constants, equations = list(program.avals), dict(program.constants), []
    for equation in program.equations:
        traced, values = _given(equation) if is_checkpoint(equation) else (None, [])
        if traced is None:
            equations.append(equation)
            continue
        given = traced.inputs[len(equation.inputs) :]
        numbers = dict(zip(traced.inputs, equation.inputs))
        for v, value in (*zip(given, values, strict=True), *traced.constants.items()):
            numbers[v] = len(avals)
            constants[numbers[v]] = value
            avals.append(traced.avals[v])
        (checkpoint,) = traced.equations
        inputs = tuple(numbers[v] for v in checkpoint.inputs)
        equations.append(checkpoint._replace(inputs=inputs, outputs=equation.outputs))
    return Program(program.inputs, program.outputs, tuple(equations), constants, avals)


def _given(checkpoint: Equation) -> tuple[Program | None, list[Any]]:
    """A checkpoint as a program of its operands and the values that it folds into keys, and these; None without any."""
    inner = called_by(checkpoint)
    folds = [equation for equation in inner.equations if equation.name == "random_fold_in"]
    folded = list(dict.fromkeys(v for fold in folds for v in fold.inputs if v in inner.constants))
    if not folded:
        return None, []

    def run(operands: list[Any], given: list[Any]) -> list[Any]:
        values = {**inner.constants, **dict(zip(inner.inputs, operands)), **dict(zip(folded, given))}
        evaluate(inner.equations, values)
        return [values[v] for v in inner.outputs]

    again = jax.checkpoint(run, policy=checkpoint.params["policy"], prevent_cse=checkpoint.params["prevent_cse"])
    types = [[inner.avals[v] for v in vs] for vs in (inner.inputs, folded)]
    traced, _ = trace(lambda _, *args: again(*args), [], *types)
    is_one = len(traced.equations) == 1 and traced.equations[0].outputs == traced.outputs
    return (traced if is_one else None), [inner.constants[v] for v in folded]
