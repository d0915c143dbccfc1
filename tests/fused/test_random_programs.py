"""Random programs: the fused step equals the unfused one, and its gradients are those of ``jax.grad``.

``RANDOM_PROGRAMS=2000 RANDOM_SEED=1 pytest tests/fused/test_random_programs.py`` runs more and other programs.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, Phase, example, given, seed, settings
from random_losses import batch, loss_of, parameters
from random_programs import Options, RandomProgram, Scan, Stack, is_layered, random_programs

from adalomo_jax import DynamicLossScale, FusedStep, Plan, StepResult, adalomo, fuse, lomo
from adalomo_jax.fused.run import passes

EXAMPLES, SEED = os.environ.get("RANDOM_PROGRAMS"), int(os.environ.get("RANDOM_SEED", "0"))
FAST = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}
LEARNING_RATE = 1e-2
# A rule that divides by a gradient turns its rounding errors into steps: adamw's `eps` is above them.
RULES = {
    "adalomo": adalomo(LEARNING_RATE),
    "lomo": lomo(LEARNING_RATE),
    "adamw": optax.adamw(LEARNING_RATE, eps=1e-3),
    "sgd with momentum": optax.sgd(LEARNING_RATE, momentum=0.9),
}
TOLERANCE = {False: 1e-5, True: 3e-2}
"""The tolerance relative to a leaf's norm, by whether something is rounded to bfloat16."""
NOISE = 1e-2
"""The part of the norm of all leaves that counts as a leaf's: errors of sums are relative to the largest summands."""


def keep_gradients() -> optax.GradientTransformation:
    """Keeps the gradients that it sees as its state, and returns them."""
    as_float32 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    return optax.GradientTransformation(
        init=lambda params: jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params),
        update=lambda updates, state, params=None: (updates, as_float32(updates)),
    )


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves, by path as plans print it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def is_trained(program: RandomProgram, path: str) -> bool:
    place, *name = path.split("/")
    if place == "integers" or path.endswith("/flags"):
        return False
    if place == "whole":
        return program.whole_trained
    part = program.parts[int(place.split()[1])]
    if isinstance(part, Scan) and name[0].startswith("stack"):
        return part.stacks[int(name[0].split()[1])].trained
    return True if isinstance(part, Scan) else part.trained


def step_of(program: RandomProgram) -> FusedStep:
    options = program.options
    return fuse(
        loss_of(program),
        optax.chain(keep_gradients(), RULES[options.rule]),
        has_aux=options.has_aux,
        trainable=lambda path: is_trained(program, path),
        max_grad_norm=options.max_grad_norm,
        microbatches=options.microbatches,
        reduction=options.reduction,
        batch_argnums=None if options.microbatches is None else (1, 2),
        loss_scale=DynamicLossScale(16.0) if options.dynamic_loss_scale else options.loss_scale,
        rms_metrics=options.rms_metrics,
        stochastic_rounding=None if options.stochastic_rounding is None else False,
    )


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Each leaf's error is small relative to its norm plus a small part of the norm of all leaves."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(expected)
    norms = [np.linalg.norm(np.asarray(x, np.float64)) for _, x in paths_and_leaves]
    total = np.linalg.norm(norms)
    for (path, e), a, norm in zip(paths_and_leaves, jax.tree.leaves(actual), norms):
        assert a.shape == e.shape and a.dtype == e.dtype, path
        error = np.linalg.norm(np.asarray(a, np.float64) - np.asarray(e, np.float64))
        assert error <= tolerance * (norm + NOISE * total), (jax.tree_util.keystr(path), error, norm, total)


def all_gradients(program: RandomProgram, params: Any, *args: Any) -> Any:
    """The norm, and the clipped gradients of the trained leaves, by ``jax.grad`` of the whole batch."""
    leaves, treedef = jax.tree.flatten(params)
    paths = list(by_path(params))
    trained = {i: leaf for i, (path, leaf) in enumerate(zip(paths, leaves)) if is_trained(program, path)}

    def loss_fn(trained: dict[int, Any]) -> Any:
        return loss_of(program)(treedef.unflatten([trained.get(i, x) for i, x in enumerate(leaves)]), *args)

    grads = jax.grad(loss_fn, has_aux=program.options.has_aux)(trained)
    grads = grads[0] if program.options.has_aux else grads
    grads = {paths[i]: g.astype(jnp.float32) for i, g in grads.items()}
    norm = optax.tree.norm(grads) if grads else jnp.float32(0)
    most = program.options.max_grad_norm
    clip = jnp.float32(1) if most is None else jnp.where(norm < most, 1.0, most / norm)
    return norm, {path: g * clip for path, g in grads.items()}


def kept_gradients(plan: Plan, result: StepResult) -> dict[str, np.ndarray]:
    """The kept gradients by path, with a stack's layers on the parameter's layer axis."""
    kept, axes = by_path(result.state.inner[0]), {leaf.path: leaf.axis for leaf in plan.leaves}
    return {path: np.moveaxis(np.asarray(x), 0, axes[path] or 0) if np.ndim(x) else x for path, x in kept.items()}


def check_plan(program: RandomProgram, plan: Plan) -> None:
    """Stacks are updated where the program's description says they must be."""
    layers = {leaf.path: leaf.layers for leaf in plan.leaves}
    for p, part in enumerate(program.parts):
        expected = [is_layered(part, stack) for stack in part.stacks] if isinstance(part, Scan) else []
        for i, must_be in enumerate(expected):
            found = layers[f"part {p}/stack {i}"]
            assert must_be is None or must_be == (found is not None), f"stack {i} of {part}\n{plan}"
    assert not any(layers[path] for path in layers if path.startswith(("whole", "integers")))


def check(program: RandomProgram) -> None:
    """Checks two steps. The second starts from the fused results of the first."""
    step, params = step_of(program), parameters(program)
    before = jax.tree.map(np.asarray, params)
    plan = step.plan(params, *batch(0))
    check_plan(program, plan)
    state = step.init(params, *batch(0))
    reference = lambda params, state, *args: (step.unfused(params, state, *args), all_gradients(program, params, *args))
    run_unfused = jax.jit(reference).lower(params, state, *batch(0)).compile(FAST)
    run = step.jit.lower(params, state, *batch(0)).compile(FAST)
    tolerance = TOLERANCE[program.rounds_to_bfloat16]
    for i in range(2):
        unfused, (norm, gradients) = run_unfused(params, state, *batch(i))
        fused = run(params, state, *batch(i))
        kept = kept_gradients(plan, fused)
        assert_close(kept, {path: np.asarray(g) for path, g in gradients.items()}, tolerance)
        assert_close(fused.metrics["grad_norm"], norm, tolerance)
        for name in ("loss", "aux", "metrics"):
            assert_close(getattr(fused, name), getattr(unfused, name), tolerance)
        assert_close(fused.state.inner[0], unfused.state.inner[0], tolerance)
        assert_close(fused.state, unfused.state, 2 * tolerance)
        assert_close(fused.params, unfused.params, tolerance)
        params, state = fused.params, fused.state
    check_moved(before, params, gradients)


def check_moved(before: Any, after: Any, gradients: dict[str, Any]) -> None:
    """A leaf moves if its gradient is no rounding error and it is not rounded itself. Untrained leaves stay."""
    for (name, old), new in zip(by_path(before).items(), jax.tree.leaves(after)):
        if name not in gradients:
            assert (np.asarray(new) == old).all(), f"{name} is not trained, and moved"
        elif np.abs(gradients[name]).max() > 1e-3 and old.dtype == np.float32:
            assert (np.asarray(new) != old).any(), f"{name} did not move"


def found(*scans: Scan, **options: Any) -> Any:
    """A program that failed once."""
    return example(RandomProgram(scans, options=Options(**options)))


_TANH = Stack("matrix", "tanh")


@found(Scan(2, (_TANH,), xs=frozenset({"index"})))
@found(Scan(2, (Stack("matrix", "tanh", before=("gain of a layer",)),)))
@found(Scan(1, (_TANH,), carry=frozenset({"accumulator"}), again=True), microbatches=2)
@seed(SEED)
@settings(
    max_examples=int(EXAMPLES or 3),
    phases=[phase for phase in Phase if EXAMPLES or phase != Phase.shrink],  # shrinking compiles for minutes
    derandomize=EXAMPLES is None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    deadline=None,
)
@given(random_programs())
def test_equals_the_unfused_step_and_jax_grad(program: RandomProgram):
    check(program)


def test_finds_cotangents_that_are_not_summed(monkeypatch: pytest.MonkeyPatch):
    """The check can fail: without the sum, a leaf that is read at both ends counts only one of them."""
    program = RandomProgram((Scan(2, (_TANH,)),), begin="embedding", end="tied")
    check(program)
    monkeypatch.setattr(passes, "accumulate", lambda cotangents, more: cotangents.update(more))
    with pytest.raises(AssertionError, match="whole/tied"):
        check(program)
