"""Stacks and saved activations in host memory: the numbers of the step without, and the memory each array is in.

The CPU backend has the memory kinds; what that saves only the compiler of an accelerator can say: test_tpu_offload.py.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from language_model import batch, init_params, make_loss

from adalomo_jax import adalomo, fuse, lomo

BATCHES = [batch(seed, batch_size=4) for seed in range(3)]
OFFLOADS = {"params": "params", "activations": "activations", "both": ("params", "activations")}
OPTIONS = {
    "adalomo": {},
    "lomo": {"tx": lomo(1e-2)},
    "adamw": {"tx": optax.adamw(1e-3)},
    "clipped": {"max_grad_norm": 0.1},
    "microbatches": {"microbatches": 2},
    "clipped microbatches": {"max_grad_norm": 0.1, "microbatches": 2},
    "frozen": {"trainable": lambda path: "up" in path or "embed" in path},
    "bfloat16": {"dtype": jnp.bfloat16},
    "bfloat16 microbatches": {"dtype": jnp.bfloat16, "microbatches": 2},
    "no remat": {"remat": "no remat"},
    "dots saved": {"remat": "dots saved"},
}


def run(offload, *, dtype=jnp.float32, remat="remat", tx=None, params=None, loss_fn=None, batches=BATCHES, **options):
    """The result of the last of some steps, and the parameters before the first."""
    step = fuse(loss_fn or make_loss(remat), tx or adalomo(1e-2), offload=offload, **options)
    params = init_params([3, 2], dtype=dtype) if params is None else params
    before = jax.tree.map(np.asarray, params)
    params = step.place(jax.tree.map(jnp.copy, params), batches[0])
    state, result = step.init(params, batches[0]), None
    for tokens in batches:
        result = step.jit(params, state, tokens)
        params, state = result.params, result.state
    return result, before


def on_host(tree):
    """The paths of what is in host memory."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path) for path, x in leaves if x.sharding.memory_kind == "pinned_host"]


@functools.cache
def plain(case):
    return run(None, **OPTIONS[case])


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("offload", OFFLOADS)
def test_equals_the_step_without(offload, case):
    (result, _), (expected, before) = run(OFFLOADS[offload], **OPTIONS[case]), plain(case)
    rtol = 0 if OPTIONS[case].get("dtype") == jnp.bfloat16 else 1e-6
    chex.assert_trees_all_close(result, expected, rtol=rtol, atol=rtol)
    with pytest.raises(AssertionError):  # it has moved, and the comparison sees it
        chex.assert_trees_all_close(result.params, before, rtol=1e-4, atol=1e-4)
