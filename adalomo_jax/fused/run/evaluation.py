"""The loss alone: a forward pass that reads one layer of a stack at a time, and keeps nothing for a backward pass.

A call of the loss itself would do, but for weights that are kept in another form it would need the floats of all.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from adalomo_jax.barriers import barrier
from adalomo_jax.fused.plan.jaxpr import evaluate
from adalomo_jax.fused.plan.plan import LayerScan, Plan
from adalomo_jax.fused.run.layers import received, slices_at
from adalomo_jax.fused.run.segment import Context, floats_after
from adalomo_jax.optimizers.kept import as_floats, is_kept


def outputs_of(
    plan: Plan, leaves: Sequence[Any], args: Sequence[Any], sliced: Sequence[bool], microbatches: int | None
) -> list[Any]:
    """The outputs of the planned program: the loss, then aux.

    Args:
      plan: the plan of the program.
      leaves: the parameters.
      args: the other inputs; those that are sliced have a leading microbatch axis.
      sliced: whether each of ``args`` is sliced.
      microbatches: their number. If there are any, each output has a leading axis of this size.
    """

    def of_one(slices: dict[int, Any]) -> list[Any]:
        return _outputs(plan, [*leaves, *(slices.get(i, x) for i, x in enumerate(args))])

    if microbatches is None:
        return of_one({})
    slices = {i: x for i, (x, is_sliced) in enumerate(zip(args, sliced, strict=True)) if is_sliced}
    return lax.scan(lambda _, slices: (None, of_one(slices)), None, slices, length=microbatches)[1]


def _outputs(plan: Plan, inputs: Sequence[Any]) -> list[Any]:
    program = plan.program
    values = {**program.constants, **dict(zip(program.inputs, inputs, strict=True))}
    context = Context(program, (), (), None, ())
    for stage in plan.stages:
        if isinstance(stage, LayerScan):
            _run_scan(stage, context, values)
        else:
            there = {v: values[v] for v in stage.inputs}
            for equation in stage.equations:
                # Each weight is decoded where it is read: a segment may hold many layers of a list.
                made = [there[v] for v in equation.inputs if not is_kept(there[v])]
                operands = {v: floats_after(there[v], made) for v in equation.inputs}
                evaluate([equation], operands)
                there |= {v: operands[v] for v in equation.outputs}
            values |= {v: there[v] for v in stage.outputs}
    return [as_floats(values[v]) for v in program.outputs]


def _run_scan(stage: LayerScan, context: Context, values: dict[int, Any]) -> None:
    """Runs a scan over layers, and adds its results to the values."""
    scan, from_stacks = stage.scan, {v for v, _ in stage.layers}
    operands = list(zip(scan.body.inputs, stage.operands))
    floats_of = lambda pairs: {v: as_floats(values[operand]) for v, operand in pairs}
    invariant = {**scan.body.constants, **floats_of(operands[: scan.num_consts])}
    evaluate(stage.invariant, invariant)
    carry = floats_of(operands[scan.num_consts : scan.first_xs])
    xs = floats_of((v, operand) for v, operand in operands[scan.first_xs :] if v not in from_stacks)

    def iteration(carry_and_stacks, i_and_xs):
        (carry, stacks), (i, xs) = carry_and_stacks, i_and_xs
        layers, _ = received(stage, context, slices_at(stage, stacks, i, stacks))
        there = invariant | xs | layers | carry
        for part in stage.body:
            evaluate(part.equations, there)
        new_carry = {v: there[out] for v, out in zip(carry, scan.body.outputs)}
        # Behind a barrier in the carry, because XLA would hoist the decoding of all layers out of the loop.
        return (new_carry, barrier(stacks)), [there[scan.body.outputs[p]] for p in stage.read_ys]

    stacks = {stack.value: values[stack.value] for stack in stage.stacks}
    (carry, _), ys = lax.scan(iteration, (carry, stacks), (jnp.arange(scan.length), xs), reverse=scan.reverse)
    values |= zip(stage.outputs, carry.values())
    values |= {stage.outputs[p]: y for p, y in zip(stage.read_ys, ys)}
