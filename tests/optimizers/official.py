"""The trajectories of the official PyTorch code (see data/make_golden.py), and our optimizers on the same problems."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tolerances import relative_error

from adalomo_jax.optimizers import adalomo

CASES = ["plain", "weight_decay", "clip_norm", "clip_value"]
LAYERS = 3
CONSTANTS = {"decay_rate": 0.8, "clipping_threshold": 1.0, "eps": 1e-30, "min_param_rms": 1e-3}
"""`step` takes them as arguments, so that one compiled program serves for other constants too."""


class Case(NamedTuple):
    meta: dict[str, Any]
    initial: list[np.ndarray]
    constants: list[list[np.ndarray]]
    """The ``c`` of each step and tensor: the gradient is ``c + 0.1 p``."""
    coefficients: list[np.float32]
    """The factor by which clipping by the global norm multiplies the gradients, for each step."""
    trajectory: list[list[np.ndarray]]
    """The parameters after each step."""


def load(name: str) -> Case:
    with np.load(Path(__file__).parents[1] / "data" / f"{name}.npz") as data:
        meta = json.loads(str(data["meta"]))
        steps, tensors = range(meta["steps"]), range(len(meta["shapes"]))
        return Case(
            meta,
            [data[f"init_p{i}"] for i in tensors],
            [[data[f"c{t}_p{i}"] for i in tensors] for t in steps],
            [data[f"coef{t}"] if meta["clip_norm"] else np.float32(1) for t in steps],
            [[data[f"p{t}_p{i}"] for i in tensors] for t in steps],
        )


class Problem(NamedTuple):
    """The settings that are fixed while compiling: a schedule, clipping by value, and the layer axis."""

    lr: float
    lrsched: float
    clip_value: float | None
    layer_axes: int | None


def transformation(problem: Problem, **constants: Any) -> optax.GradientTransformationExtraArgs:
    """The transformation that the official code ran: `adalomo`, after clipping by value if the case has it."""
    schedule = optax.exponential_decay(problem.lr, 1, problem.lrsched)
    clip = optax.identity() if problem.clip_value is None else optax.clip(problem.clip_value)
    return optax.chain(clip, adalomo(schedule, layer_axes=problem.layer_axes, **constants))


def step(problem: Problem, constants: dict[str, Any], params: Any, state: Any, c: Any, coefficient: Any) -> Any:
    tx = transformation(problem, **constants)
    grads = [(c_i + 0.1 * p_i) * coefficient for c_i, p_i in zip(c, params)]
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


compiled_step = jax.jit(step, static_argnums=0)


def run(
    case: Case, *, layer_axes: int | None = None, jit: bool = True, steps_before: int = 0, **changed: Any
) -> list[list[jax.Array]]:
    """The parameters after each step of `adalomo` with the case's constants, except for those in ``changed``."""
    meta = case.meta
    problem = Problem(meta["lr"], meta["lrsched"], meta["clip_value"], layer_axes)
    constants = CONSTANTS | {"weight_decay": meta["wd"]} | changed
    params, trajectory = [jnp.asarray(p) for p in case.initial], []
    initial: Any = transformation(problem, **constants).init(params)
    clip, (rule, *others) = initial
    state = (clip, (rule._replace(count=rule.count + steps_before), *others))
    for c, coefficient in zip(case.constants, case.coefficients):
        params, state = (compiled_step if jit else step)(problem, constants, params, state, c, coefficient)
        trajectory.append(params)
    return trajectory


def worst_error(trajectory: Any, case: Case) -> float:
    """The largest error over all steps and tensors."""
    return relative_error(trajectory, case.trajectory)


def companion(case: Case, layer: int) -> Case:
    """The case's problem with other numbers: rolled and scaled, so that statistics shared between layers would show."""
    other = lambda x, scale: np.roll(x, layer, axis=-1) * np.float32(scale)
    return case._replace(
        initial=[other(p, 2.0**layer) for p in case.initial],
        constants=[[other(c, 3.0 * layer) for c in cs] for cs in case.constants],
        trajectory=[],
    )


def stack(cases: list[Case], axis: int) -> Case:
    """One problem whose tensors have the cases as layers along ``axis``."""
    together = lambda *layers: np.stack(layers, axis)
    return cases[0]._replace(
        initial=jax.tree.map(together, *[case.initial for case in cases]),
        constants=jax.tree.map(together, *[case.constants for case in cases]),
        trajectory=[],
    )


def unstack(trajectory: Any, axis: int, layer: int) -> Any:
    return jax.tree.map(lambda p: np.take(np.asarray(p), layer, axis), trajectory)
