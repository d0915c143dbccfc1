"""Every argument is checked where it is given: the error is one line with its name, what must hold, and the value."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adalomo_jax.optimizers import (
    adalomo,
    apply_updates,
    lomo,
    per_layer,
    scale_by_adalomo,
    scale_by_param_rms,
    stochastic_round,
)

NO_NUMBERS = [None, "1e-3", 1j, True, [1e-3], np.ones(3), jnp.ones((1,)), np.complex64(1)]
NOT_FINITE = [float("nan"), float("inf"), -float("inf"), np.float32("nan"), jnp.float32("inf")]
RANGES: dict[str, tuple[str, list[Any], list[Any]]] = {
    "learning_rate": ("a schedule, or at least 0 and finite", [-1e-3], [0, 0.0, np.float32(1e-3), jnp.float32(1)]),
    "decay_rate": ("above 0 and finite", [0, -0.8], [1, np.float64(0.8)]),
    "b2": ("at least 0 and less than 1", [1, 1.5, -0.1], [0, 0.999, None]),
    "clipping_threshold": ("above 0 and finite", [0.0, -1], [2, np.int32(1)]),
    "eps": ("above 0 and finite", [0.0, -1e-30], [1e-30, jnp.float16(0)]),
    "min_param_rms": ("at least 0 and finite", [-1e-3], [0.0]),
    "weight_decay": ("at least 0 and finite", [-0.1, np.float32(-0.1)], [0, 0.1]),
    "clip_value": ("above 0 and finite", [0, -1.0], [1, None]),
}
"""Each argument's condition, values outside its range, and values inside it."""
TAKEN_BY: dict[str, tuple[Any, list[str]]] = {
    "adalomo": (adalomo, [name for name in RANGES if name != "clip_value"]),
    "lomo": (lomo, ["learning_rate", "clip_value", "weight_decay"]),
    "scale_by_adalomo": (scale_by_adalomo, ["decay_rate", "b2", "clipping_threshold", "eps"]),
    "scale_by_param_rms": (scale_by_param_rms, ["min_param_rms"]),
}
NUMBERS = [(rule, name) for rule, (_, names) in TAKEN_BY.items() for name in names]


def make(rule: str, **given: Any) -> Any:
    needed = {"learning_rate": 1e-3} if rule in ("adalomo", "lomo") else {}
    return TAKEN_BY[rule][0](**needed | given)


def refused(call: Any, *parts: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


@pytest.mark.parametrize("rule, name", NUMBERS)
def test_a_number_is_checked(rule: str, name: str):
    invariant, out, good = RANGES[name]
    for value in [*NO_NUMBERS, *NOT_FINITE, *out]:
        if value is None and None in good:
            continue
        refused(lambda value=value: make(rule, **{name: value}), f"{name} must be {invariant}, got ")
    for value in good:
        make(rule, **{name: value})
        if value is not None:
            jax.make_jaxpr(lambda x: make(rule, **{name: x}).init({}))(value)


def test_the_message_names_the_value():
    refused(lambda: adalomo(float("nan")), "learning_rate must be a schedule, or at least 0 and finite, got nan.")
    refused(lambda: adalomo(None), "got None.")  # pyright: ignore
    refused(lambda: adalomo("1e-3"), "got '1e-3'.")  # pyright: ignore
    refused(lambda: adalomo(jnp.ones(3)), "got an array of shape (3,).")  # pyright: ignore
    refused(lambda: lomo(0.1, clip_value=0.0), "got 0.0; pass None to clip nothing.")


def test_injected_hyperparameters_are_traced_or_arrays_and_pass():
    params = {"w": jnp.ones((2, 3), jnp.float16)}
    tx = optax.inject_hyperparams(adalomo)(1e-2)  # its eps is 0 in float16
    jax.eval_shape(tx.update, params, tx.init(params), params)


@pytest.mark.parametrize("rule", [adalomo, lomo])
@pytest.mark.parametrize("mask", ["layers", {"w": "x"}, {"w": 1}, lambda params: {"w": 0.5}])
def test_a_mask_is_of_bools(rule: Any, mask: Any):
    params = {"w": jnp.ones((2, 3))}
    call = lambda: rule(0.1, weight_decay=0.1, weight_decay_mask=mask).init(params)
    refused(call, "weight_decay_mask", "must be a bool, a tree of bools, or a callable that makes one, got ")


@pytest.mark.parametrize("mask", [{"w": np.bool_(True)}, {"w": jnp.array(True)}, True, lambda p: {"w": True}])
def test_bools_of_any_kind_are_a_mask(mask: Any):
    params = {"w": jnp.ones((2, 3))}
    tx = lomo(0.1, weight_decay=0.1, weight_decay_mask=mask)
    assert float(tx.update({"w": jnp.zeros((2, 3))}, tx.init(params), params)[0]["w"][0, 0]) < 0  # pyright: ignore


@pytest.mark.parametrize("make", [lambda axes: adalomo(0.1, layer_axes=axes), lambda axes: per_layer(lomo(0.1), axes)])
def test_layer_axes_are_integers_of_parameters_that_there_are(make: Any):
    params = {"head": jnp.ones((4, 2)), "layers": jnp.ones((3, 4, 4))}
    for axes in (True, "0", 0.0, {"head": None, "layers": False}, {"head": None, "layers": "0"}):
        refused(lambda axes=axes: make(axes), "layer_axes", "must be an integer or None, got ")
        refused(lambda axes=axes: make(lambda params: axes).init(params), "must be an integer or None, got ")
    for axes in ({"head": None, "layers": 0, "norm": 0}, {"head": None, "layers": {"w": 0}}):
        refused(lambda axes=axes: make(axes).init(params), "matches no parameter; leave it out")
    make({"head": None, "layers": np.int64(0)}).init(params)
    masked = optax.masked(make({"head": None, "layers": 0}), {"head": False, "layers": True})
    jax.eval_shape(lambda: masked.update(params, masked.init(params), params))


def test_per_layer_takes_transformations():
    wrong: list[Any] = [None, adalomo, 1e-3, (adalomo(0.1), lomo(0.1))]
    for tx in wrong:
        refused(lambda tx=tx: per_layer(tx, 0), "tx must be an optax.GradientTransformation")
        refused(lambda tx=tx: per_layer(tx, None), "tx must be an optax.GradientTransformation")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "float32", "int8"])
def test_stochastic_round_is_to_bfloat16_and_float16(dtype: str):
    call = lambda: stochastic_round(jnp.ones(3), jnp.dtype(dtype), jax.random.key(0))
    refused(call, f"dtype must be bfloat16 or float16, got {dtype}.")


@pytest.mark.parametrize("dtype", ["float16", "int32"])
def test_stochastic_round_is_of_float32(dtype: str):
    call = lambda: stochastic_round(jnp.ones(3, dtype), jnp.bfloat16, jax.random.key(0))
    refused(call, f"x must be float32, got {dtype}; give it x.astype(jnp.float32).")


@pytest.mark.parametrize("key", [0, "key", jnp.zeros(2, jnp.uint32), jnp.float32(0)])
def test_a_key_is_one_typed_key(key: Any):
    due = "key must be one typed PRNG key, as jax.random.key(0) is, got "
    refused(lambda: stochastic_round(jnp.ones(3), jnp.bfloat16, key), due)
    refused(lambda: apply_updates(jnp.ones(3), jnp.ones(3), key=key), due)
    refused(lambda: apply_updates(jnp.ones(3), jnp.ones(3), key=jax.random.split(jax.random.key(0), 2)), due)


def test_updates_fit_the_parameters():
    params, key = {"w": jnp.ones((2, 3), jnp.bfloat16)}, jax.random.key(0)
    refused(lambda: apply_updates(params, {"v": jnp.ones((2, 3))}, key=key), "updates must be a tree like params")
    due = re.escape("updates['w'] must have the shape (2, 3) of the parameter, got (3,).")
    with pytest.raises(ValueError, match=due):
        apply_updates(params, {"w": jnp.ones(3)}, key=key)
    narrow = {"w": jnp.ones((2, 3), jnp.float8_e4m3fn)}
    refused(
        lambda: apply_updates(narrow, {"w": jnp.ones((2, 3))}, key=key),
        "params['w'] must be of 16 bits at least, got float8_e4m3fn; keep it in bfloat16.",
    )
