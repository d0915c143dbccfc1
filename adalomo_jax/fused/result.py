"""What a training step returns, and the step that takes over the memory of its arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from adalomo_jax.fused.buffers import check_apart
from adalomo_jax.fused.plan.call_signature import check_spread
from adalomo_jax.fused.plan.checks import check_extra_args, check_not_deleted
from adalomo_jax.fused.plan.plan import Plan
from adalomo_jax.fused.state import FusedState
from adalomo_jax.optimizers.per_layer import Group


class StepResult(NamedTuple):
    """What a training step returns."""

    params: Any
    """The updated parameters."""
    state: FusedState
    """The updated state."""
    loss: jax.Array
    """The loss before the update."""
    aux: Any
    """What ``loss_fn`` returned besides the loss; None without ``has_aux``. With microbatches, one each, stacked."""
    metrics: dict[str, Any]
    """By name:

    - ``loss``.
    - ``grad_norm``: the norm of the whole gradient, before clipping, float32. Without ``max_grad_norm`` it is infinite
      if its square is, beyond 1.8e19, unless ``tx`` keeps nothing of a gradient.
    - ``skipped``: True if nothing was written.
    - ``unwritten``: the number of tensors that were not written; each layer of a stack counts as one tensor.
    - ``loss_scale``: the scale of this step, if it is dynamic.
    - ``update_rms``, ``param_rms``: with ``rms_metrics``, by path; for a stack, one number for each layer.
    """


@dataclass(frozen=True, eq=False)
class Donating:
    """A step under ``jax.jit`` that takes over the memory of the parameters and the state it is given."""

    jitted: Any

    def __call__(self, params: Any, state: FusedState, *args: Any, **extra_args: Any) -> StepResult:
        """Runs the step on ``(params, state, *args, **extra_args)``: arguments by name go to ``tx.update``.

        ``params`` and ``state`` are gone afterwards: continue with those that it returns.
        """
        check_call(params, state, args)
        check_extra_args(extra_args)
        check_apart({"params": params, "state": state}, {"args": args, "extra_args": extra_args})
        return self.jitted(params, state, *args, **extra_args)

    def lower(self, params: Any, state: FusedState, *args: Any, **extra_args: Any) -> Any:
        """Like ``lower`` of ``jax.jit``: ``.lower(...).compile()`` gives its memory and cost, or an executable."""
        return self.jitted.lower(params, state, *args, **extra_args)


def check_call(params: Any, state: Any, args: Sequence[Any]) -> None:
    """Refuses arguments of a step that are known to be wrong before it is traced."""
    if not isinstance(state, FusedState):
        raise ValueError(f"The state must be what step.init returns, but it is of the type {type(state).__name__}.")
    check_not_deleted(params, "params")
    check_not_deleted(state, "state")
    check_spread(state.signature, params, args)


def by_path(plan: Plan, of_groups: Mapping[Group, list[jax.Array]]) -> dict[str, jax.Array]:
    """The arrays of all groups' leaves, by path; a layer that came from a list has its own path."""
    found: dict[str, jax.Array] = {}
    for group, xs in of_groups.items():
        for i, x in zip(group.leaves, xs, strict=True):
            leaf = plan.leaves[i]
            found |= zip(leaf.layer_paths, x) if leaf.layer_paths else {leaf.path: x}
    return found
