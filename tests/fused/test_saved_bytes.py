"""`saved_bytes` sizes the residuals from shapes alone."""

import jax
import jax.numpy as jnp
import pytest

from adalomo_jax import adalomo, fuse

LAYERS, DIM, BATCH = 6, 32, 8
INPUT = BATCH * DIM * 4
PARAMS = {"layers": jax.ShapeDtypeStruct((LAYERS, DIM, DIM), jnp.float32)}
X = jax.ShapeDtypeStruct((BATCH, DIM), jnp.float32)


def saved(transform, **options):
    def loss_fn(params, x):
        layer = lambda x, w: (x + jnp.sin(jnp.tanh(x @ w)), None)
        return jnp.mean(jax.lax.scan(transform(layer), x, params["layers"])[0] ** 2)

    return fuse(loss_fn, adalomo(1e-2), **options).saved_bytes(PARAMS, X)


def test_a_rematerialized_layer_saves_its_input():
    assert saved(jax.checkpoint) == LAYERS * INPUT


def test_another_saves_its_residuals_too():
    assert saved(lambda layer: layer) >= 3 * LAYERS * INPUT


def test_a_policy_is_honoured():
    policy = jax.checkpoint_policies.dots_saveable
    assert saved(lambda layer: jax.checkpoint(layer, policy=policy)) == 2 * LAYERS * INPUT


@pytest.mark.parametrize("microbatches", [2, 4])
def test_of_microbatches_the_inputs_of_all(microbatches):
    assert saved(jax.checkpoint, microbatches=microbatches) == LAYERS * INPUT


def test_checkpointed_layers_of_a_list_save_their_inputs():
    """The first layer's input is the batch, and the last layer's residuals are used at once: neither counts."""

    def loss_fn(params, x):
        for w in params:
            x = jax.checkpoint(lambda x, w: x + jnp.sin(jnp.tanh(x @ w)))(x, w)
        return jnp.mean(x**2)

    params = [jax.ShapeDtypeStruct((DIM, DIM), jnp.float32)] * LAYERS
    assert fuse(loss_fn, adalomo(1e-2), roll=False).saved_bytes(params, X) == (LAYERS - 1) * INPUT
