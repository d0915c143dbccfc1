"""Random loops over lists of equal or nearly equal layers keep their numbers if the step rolls them up.

``RANDOM_PROGRAMS=500 RANDOM_SEED=1 pytest tests/fused/test_random_lists.py`` runs other loops.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from lists_of_layers import data, fuse_lists
from random_lists import DEFAULTS, loops, loss_of, params_of, trainable_of

from adalomo_jax import lomo
from adalomo_jax.fused.plan import equation_signatures as signatures
from adalomo_jax.fused.plan.jaxpr import program_of
from adalomo_jax.fused.plan.placed_tree import layers_of

EXAMPLES = os.environ.get("RANDOM_PROGRAMS")


def unstacked(placed):
    """The leaves, in the order of the tree that was placed, as NumPy arrays."""
    found = {}
    for layers, leaf in zip(layers_of(placed), map(np.asarray, jax.tree.leaves(placed)), strict=True):
        found |= zip(layers, leaf if len(layers) > 1 else [leaf])
    return [found[i] for i in sorted(found)]


def check(loop):
    """Compares a LOMO step on the rolled layers with the loop on its own list; returns how many layers were rolled."""
    loop = DEFAULTS | loop
    loss, params, is_trained = loss_of(loop), params_of(loop), trainable_of(loop)
    step = fuse_lists(loss, lomo(1.0), trainable=is_trained)
    placed = step.place(params, *data(0))
    result = jax.jit(step)(placed, step.init(placed, *data(0)), *data(0))
    loss_of_list, gradient = jax.value_and_grad(loss)(params, *data(0))  # runs op by op, so nothing compiles
    np.testing.assert_allclose(result.loss, loss_of_list, rtol=1e-5)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, old), new, g in zip(leaves, unstacked(result.params), jax.tree.leaves(gradient), strict=True):
        expected = np.asarray(g) * is_trained(jax.tree_util.keystr(path, simple=True, separator="/"))
        np.testing.assert_allclose(old - new, expected, rtol=2e-4, atol=4e-6 * (1 + np.max(np.abs(expected))))
    stacks = [layers for layers in layers_of(placed) if len(layers) > 1]
    of_stacks = [leaf for leaf in step.plan(placed, *data(0)).leaves if leaf.layer_paths]
    assert all(leaf.layers or not leaf.trained for leaf in of_stacks), "what was stacked is not scanned over"
    of_layers = [leaf for leaf in of_stacks if leaf.path.startswith("layers")]
    assert len(of_stacks) == len(stacks)
    return sum(len(leaf.layer_paths) for leaf in of_layers) // 3


def rolled_at_least(loop):
    """How many layers of a loop without changes should be rolled."""
    begin, end = loop["ends"]
    layers, period = loop["layers"] - begin - end, len(loop["period"])
    return layers - layers % period if layers >= 2 * period else 0


@seed(int(os.environ.get("RANDOM_SEED", "0")))
@settings(
    max_examples=int(EXAMPLES or 2),
    derandomize=EXAMPLES is None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    deadline=None,
)
@given(loops())
def test_numbers_are_those_of_the_loop(loop):
    rolled = check(loop)
    two_layers = {"before", "two before"} & loop["extras"] or loop["remat"] == "two"
    if not loop["changes"] and not two_layers and loop["ends"] == (0, 0):
        assert rolled >= rolled_at_least(loop)


def test_finds_layers_that_are_taken_for_alike(monkeypatch: pytest.MonkeyPatch):
    """The check can fail: if a layer's own derivative does not count, it gets another layer's."""
    loop = {"period": ["own derivative"], "changes": {2: "derivative"}}
    check(loop)
    monkeypatch.setattr(signatures, "pullback_of", lambda equation: program_of(jax.make_jaxpr(jnp.sin)(1.0)))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(loop)
