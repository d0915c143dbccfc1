"""Random loops over lists of layers, alike or nearly so: whatever is rolled up has the numbers of the loop.

``RANDOM_PROGRAMS=500 RANDOM_SEED=1 pytest tests/fused/test_random_lists.py`` runs others.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from lists_of_layers import DIM, apply, block, data, error, matrix

from adalomo_jax import fuse, lomo
from adalomo_jax.fused import signatures
from adalomo_jax.fused.jaxpr import evaluate, program_of, trace
from adalomo_jax.fused.reroll import reroll
from adalomo_jax.fused.stacked import layers_of, unstack_layers

EXAMPLES = os.environ.get("RANDOM_PROGRAMS")
ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "silu": jax.nn.silu}


def _with_derivative(factor):
    """The tangent function, whose derivative is multiplied by a factor."""
    fn = jax.custom_vjp(jnp.tanh)
    fn.defvjp(lambda x: (jnp.tanh(x), x), lambda x, d: (factor * d / jnp.cosh(x) ** 2,))
    return fn


PERIODS = st.lists(st.sampled_from([*ACTIVATIONS, "own derivative"]), min_size=1, max_size=3)
EXTRAS = ["key", "split", "scale", "residual", "shared", "mask", "inputs", "penalty", "count", "before"]
CHANGES = ["activation", "derivative", "tie", "skip", "twice", "remat", "number", "first output", "other mask", "swap"]


@st.composite
def loops(draw):
    """A description: activations of a period, what each layer does besides, and what single layers do otherwise."""
    layers = draw(st.integers(3, 7))
    changes = draw(st.dictionaries(st.integers(0, layers - 1), st.sampled_from(CHANGES), max_size=2))
    return {
        "layers": layers,
        "period": draw(PERIODS),
        "remat": draw(st.sampled_from(["none", "layer", "part"])),
        "extras": draw(st.sets(st.sampled_from(EXTRAS), max_size=4)),
        "changes": changes,
        "cast": draw(st.booleans()),
    }


def loss_of(loop):
    """The loss of a description, of parameters, inputs and a key."""
    extras, changes, n = loop["extras"], loop["changes"], loop["layers"]

    def loss(params, x, key):
        if loop["cast"]:
            params = jax.tree.map(lambda w: (w * 1.0).astype(jnp.float32), params)
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1])))
        keys, total, seen = jax.random.split(key, n), 0.0, 0
        x0 = x = before = x @ params["into"]
        outputs = []
        for i, p in enumerate(params["layers"]):
            change, name = changes.get(i), loop["period"][i % len(loop["period"])]
            if change == "activation":
                name = "silu" if name != "silu" else "relu"
            factor = 2.0 if change == "derivative" else 1.0
            fn = _with_derivative(factor) if name == "own derivative" or change == "derivative" else ACTIVATIONS[name]
            one = lambda p, x, fn=fn: apply(p, x, fn)
            if loop["remat"] != "none" and change != "remat":
                one = jax.checkpoint(one)
            if change == "tie":
                p = p | {"up": params["layers"][(i + 1) % n]["up"]}
            if change == "swap":
                p = p | {"scale": p["scale"][::-1]}
            before, y = x, one(p, x)
            y = one(p, y) if change == "twice" else y
            y = x if change == "skip" else y
            if "key" in extras:
                key, own = jax.random.split(key)
                y = y * jax.random.bernoulli(own, 0.8, y.shape)
            if "split" in extras:
                y = y * jax.random.bernoulli(keys[i], 0.8, y.shape)
            if "scale" in extras:
                y = y * (1.0 + (0.5 if change == "number" else 0.1) * i)
            if "residual" in extras:
                y = y + x
            if "shared" in extras:
                y = y + 0.1 * jnp.tanh(y @ params["shared"])
            if "mask" in extras:
                seen_by = mask if change != "other mask" else mask.T
                y = y + jax.nn.softmax(jnp.where(seen_by > 0, y @ y.swapaxes(-1, -2), -1e9)) @ y
            if "inputs" in extras:
                y = y + 0.1 * x0
            if "penalty" in extras:
                total += jnp.mean(jnp.abs(y))
            if "count" in extras:
                seen += 1
                y = y + 0.01 * seen
            if "before" in extras:
                y, before = y + 0.1 * before, x
            if change == "first output" and outputs:
                y = y + outputs[0]
            x = y / (1.0 + jnp.sqrt(jnp.mean(jnp.square(y))))
            outputs.append(x)
        return error(x @ params["head"]) + total

    return loss


def check(loop):
    """The gradients of what was rolled up, and those of the loop; how many layers were rolled."""
    loss = loss_of(loop)
    params = {"layers": [block(i) for i in range(loop["layers"])], "shared": matrix(60, DIM, DIM)}
    params |= {"into": matrix(200, DIM, DIM), "head": matrix(201, DIM, DIM)}
    placed = fuse(loss, lomo(1.0)).place(params, *data(0))
    leaves, treedef = jax.tree.flatten(placed)
    of_list = lambda leaves, *args: loss(unstack_layers(treedef.unflatten(leaves)), *args)
    program, _ = trace(of_list, leaves, *data(0))
    of_params = program.inputs[: len(leaves)]
    rolled = reroll(program, of_params)

    def run(leaves):
        values = dict(rolled.constants) | dict(zip(rolled.inputs, [*leaves, *data(0)]))
        evaluate(rolled.equations, values)
        return values[rolled.outputs[0]]

    actual = unstack_layers(treedef.unflatten(jax.jit(jax.grad(run))(leaves)))
    expected = jax.jit(jax.grad(loss))(params, *data(0))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-4, atol=2e-6 * (1 + float(jnp.max(jnp.abs(e)))))
    stacks = [i for i, layers in enumerate(layers_of(placed)) if len(layers) > 1]
    scans = [equation for equation in rolled.equations if equation.name == "scan"]
    read = {v for scan in scans for v in scan.inputs}
    assert all(of_params[i] in read for i in stacks), "what was stacked is not scanned over"
    return sum(len(layers_of(placed)[i]) for i in stacks) // 3


@seed(int(os.environ.get("RANDOM_SEED", "0")))
@settings(
    max_examples=int(EXAMPLES or 8),
    derandomize=EXAMPLES is None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    deadline=None,
)
@given(loops())
def test_numbers_are_those_of_the_loop(loop):
    rolled = check(loop)
    if not loop["changes"] and "before" not in loop["extras"]:
        layers, period = loop["layers"], len(loop["period"])
        assert rolled >= (layers - layers % period if layers >= 2 * period else 0)


def test_finds_layers_that_are_taken_for_alike(monkeypatch: pytest.MonkeyPatch):
    """The check can fail: where derivatives of their own do not count, one layer's is another's."""
    loop = dict(layers=4, period=["own derivative"], remat="none", extras=set(), changes={2: "derivative"}, cast=False)
    check(loop)
    monkeypatch.setattr(signatures, "pullback_of", lambda equation: program_of(jax.make_jaxpr(jnp.sin)(1.0)))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(loop)
