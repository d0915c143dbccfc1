"""adalomo equals the trajectories of the official PyTorch code in every step of every case."""

import inspect
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official import CASES, CONSTANTS, LAYERS, companion, load, run, stack, unstack, worst_error
from tiers import slow
from tolerances import RELATIVE, assert_close

from adalomo_jax.optimizers import adalomo

TOLERANCE = RELATIVE["float32"]


@pytest.mark.parametrize(
    ("name", "jit"),
    [*((name, True) for name in CASES), *(slow(name, False) for name in CASES)],
)
def test_equals_the_official_code(name: str, jit: bool):
    case = load(name)
    assert worst_error(run(case, jit=jit), case) <= TOLERANCE


def test_the_constants_of_these_runs_are_the_defaults():
    defaults = inspect.signature(adalomo).parameters
    assert {name: defaults[name].default for name in CONSTANTS} == CONSTANTS


@pytest.mark.parametrize(
    ("name", "axis", "jit"),
    [(name, i % 2, True) for i, name in enumerate(CASES)]
    + [slow(name, 1 - i % 2, True) for i, name in enumerate(CASES)]
    + [slow(name, axis, False) for name in CASES for axis in (0, 1)],
)
def test_a_layer_of_a_stack_equals_the_official_code(name: str, axis: int, jit: bool):
    case, position = load(name), CASES.index(name) % LAYERS
    layers = [companion(case, k) for k in range(1, LAYERS)]
    layers.insert(position, case)
    together = run(stack(layers, axis), layer_axes=axis, jit=jit)
    assert worst_error(unstack(together, axis, position), case) <= TOLERANCE
    for k, layer in enumerate(layers):
        assert_close(unstack(together, axis, k), run(layer))


@pytest.mark.parametrize("name, axis", list(zip(CASES, [0, 1, 0, 1])))
def test_statistics_over_the_whole_stack_break_it(name: str, axis: int):
    case = load(name)
    layers = [case, *(companion(case, k) for k in range(1, LAYERS))]
    together = run(stack(layers, axis), layer_axes=None)
    assert worst_error(unstack(together, axis, 0), case) > 5 * TOLERANCE


WRONG = [
    *((name, constant, value) for name in CASES for constant, value in [
        ("clipping_threshold", 1e9), ("decay_rate", 0.79), ("eps", 1e-3), ("steps_before", 1)
    ]),
    ("weight_decay", "weight_decay", 0.0),
    ("clip_norm", "weight_decay", 0.0),
    ("clip_value", "min_param_rms", 0.0),
    ("plain", "b2", 0.9),
]  # fmt: skip


@pytest.mark.parametrize("name, constant, value", WRONG)
def test_another_constant_or_a_later_step_breaks_it(name: str, constant: str, value: float):
    case, changed = load(name), cast(Any, {constant: value})
    assert worst_error(run(case, **changed), case) > 5 * TOLERANCE


@pytest.mark.parametrize("name", ["clip_norm", "clip_value"])
def test_unclipped_gradients_break_it(name: str):
    case = load(name)
    unclipped = case._replace(
        meta=case.meta | {"clip_value": None}, coefficients=[np.float32(1) for _ in case.coefficients]
    )
    assert worst_error(run(unclipped), case) > 5 * TOLERANCE


def test_weights_rounded_to_bfloat16_break_it():
    case = load("plain")
    assert worst_error(jax.tree.map(lambda p: p.astype(jnp.bfloat16), run(case)), case) > 5 * TOLERANCE
