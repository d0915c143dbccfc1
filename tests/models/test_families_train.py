"""A fused step of a model of each family gives the weights that plain Optax gives, layer by layer and in place."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import FAMILIES, random_params
from tiers import slow

from adalomo_jax import fuse
from adalomo_jax.models import decoder_of, next_token_loss

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 24)))


ALWAYS = {("gemma-3", "tiles")}


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        (family, kind) if (family, kind) in ALWAYS else slow(family, kind)
        for family in FAMILIES
        for kind in ("blocks", "tiles")
    ],
)
def test_a_fused_step_is_a_step_of_optax(family, attention):
    config, params = FAMILIES[family], random_params(FAMILIES[family])
    tx = optax.sgd(0.1, momentum=0.9)  # which sees no difference between a stack and its layers

    def loss_fn(params, tokens):
        model = decoder_of(config, params)
        model.layers.self_attn.kind = attention
        return next_token_loss(model, tokens, router_loss=config.router_aux_loss_coef)

    @jax.jit
    def plain(params, state):
        loss, gradients = jax.value_and_grad(loss_fn)(params, TOKENS)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    step = fuse(loss_fn, tx)
    state = step.init(params, TOKENS)
    found, expected, theirs = params, params, tx.init(params)
    for _ in range(2):
        expected, theirs, loss = plain(expected, theirs)
        result = jax.jit(step)(found, state, TOKENS)
        found, state = result.params, result.state
        assert float(result.loss) == pytest.approx(float(loss), abs=1e-5)
    moved = jax.tree.map(lambda new, old: float(jnp.max(jnp.abs(new - old))), expected, params)
    assert min(jax.tree.leaves(moved)) > 1e-6
    chex.assert_trees_all_close(found, expected, atol=2e-5)
    assert step.plan(params, TOKENS).gradient_bytes < sum(x.nbytes for x in jax.tree.leaves(params["layers"]))
