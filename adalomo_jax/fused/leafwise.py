"""Whether a transformation treats leaves separately, decided by following the data through its update.

The fused step never holds two layers' gradients, so an update of one leaf that depends on the gradient of another (a
global norm, a shared buffer) cannot be computed, and asking `tx` layer by layer would compute something else, silently.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from adalomo_jax.fused.jaxpr import Program, trace
from adalomo_jax.optimizers.per_layer import PerLayer, asking_for

_WAY_OUT = (
    "fuse needs a tx that treats leaves separately, for it never holds all gradients. Leave out what mixes them: "
    "instead of optax.clip_by_global_norm say fuse(..., max_grad_norm=...), instead of optax.MultiSteps "
    "fuse(..., microbatches=...), and optax.apply_if_finite is there already, as skip_nonfinite."
)

_RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator")


def check_leafwise(optimizer: PerLayer, paths: Sequence[str]) -> None:
    """Raises ValueError where the update of one leaf, or what is kept for none, depends on another leaf's gradient.

    And where random numbers are drawn: keys are kept for no leaf, so they would be the same for each layer.

    Nothing is computed. What a loop or a branch returns is taken to depend on all that goes into it.
    """
    trained = sorted(i for group in optimizer.groups for i in group.leaves)
    tensors, paths = [optimizer.tensors[i] for i in trained], [paths[i] for i in trained]
    tree_of = partial(optimizer.tree_of, trained)

    def update(grads: list[Any], params: list[Any], state: Any) -> tuple[list[Any], list[Any]]:
        updates, state = optimizer.tx.update(tree_of(grads), state, tree_of(params))
        return jax.tree.leaves(updates), jax.tree.leaves(state)

    with asking_for(None):
        state = jax.eval_shape(optimizer.tx.init, tree_of(tensors))
        program, _ = trace(update, tensors, list(tensors), state)
    if any(equation.name in _RANDOM for equation in program.equations):
        raise ValueError(
            "tx draws random numbers, and asked layer by layer it would draw the same for each layer. "
            "Leave out what does, such as optax.add_noise."
        )
    n = len(paths)
    of_updates, of_state = _leaves_behind(program, n)
    for i, leaves in enumerate(of_updates):
        if leaves - {i}:
            other = paths[min(leaves - {i})]
            raise ValueError(
                f"tx mixes leaves: the update of {paths[i]!r} depends on the gradient of {other!r}. {_WAY_OUT}"
            )
    shared = optimizer.shared_paths
    for (path, _), leaves in zip(jax.tree_util.tree_leaves_with_path(state), of_state):
        if len(leaves) > 1 or (leaves and path in shared):
            names = ", ".join(repr(paths[i]) for i in sorted(leaves)[:2])
            name = f"state{jax.tree_util.keystr(path)}"
            raise ValueError(f"tx mixes leaves: its {name} depends on the gradients of {names}. {_WAY_OUT}")


def _leaves_behind(program: Program, n: int) -> tuple[list[set[int]], list[set[int]]]:
    """Of each update and of each new leaf of the state, the leaves whose gradients it depends on, after any step.

    The program's inputs are ``n`` gradients, ``n`` parameters and the state, its outputs ``n`` updates and the state.
    """
    of_state: list[set[int]] = [set() for _ in program.outputs[n:]]
    while True:
        behind = {v: {i % n} for i, v in enumerate(program.inputs[: 2 * n])}
        behind |= dict(zip(program.inputs[2 * n :], of_state))
        for equation in program.equations:
            leaves = set().union(*(behind.get(v, set()) for v in equation.inputs))
            behind |= {v: leaves for v in equation.outputs}
        found = [behind.get(v, set()) for v in program.outputs]
        if found[n:] == of_state:
            return found[:n], of_state
        of_state = [old | new for old, new in zip(of_state, found[n:])]
