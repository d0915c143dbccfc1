"""Typed PRNG keys among the parameters are left alone, as integers are."""

import jax
import jax.numpy as jnp
import optax
import pytest
from comparison import relative_error
from jax import lax
from tiers import always, slow

from adalomo_jax import fuse

TX = optax.sgd(0.1, momentum=0.9)
X = jnp.linspace(-1.0, 1.0, 16).reshape(4, 4)
W = 0.3 * jax.random.normal(jax.random.key(0), (3, 4, 4))
KEYS = {
    "one": jax.random.key(1),
    "one a layer": jax.random.split(jax.random.key(1), 3),
    "two a layer": jax.random.split(jax.random.key(1), (3, 2)),
}


def loss_fn(params, x):
    """Drops entries with each layer's key."""
    keys = jnp.broadcast_to(params["key"], 3) if params["key"].ndim == 0 else params["key"]

    def layer(h, layer):
        w, key = layer
        kept = jax.random.bernoulli(key if key.ndim == 0 else key[1], 0.5, h.shape)
        return h + jnp.where(kept, jnp.tanh(h @ w), 0.0), None

    return jnp.mean(lax.scan(jax.checkpoint(layer), x, (params["w"], keys))[0] ** 2)


PLAIN, TWO_PASSES = {}, {"microbatches": 2, "max_grad_norm": 0.5}


@pytest.mark.parametrize(
    ("keys", "options"),
    [slow("one", PLAIN), ("one a layer", TWO_PASSES), slow("two a layer", PLAIN)]
    + [slow("one", TWO_PASSES), slow("one a layer", PLAIN), slow("two a layer", TWO_PASSES)],
    ids=lambda x: x if isinstance(x, str) else "two passes" if x else "plain",
)
def test_equals_optax_with_the_keys_apart(keys, options):
    key, params = KEYS[keys], {"w": W, "key": KEYS[keys]}
    step = fuse(loss_fn, TX, **options)
    halves = [X[:2], X[2:]] if options else [X]  # each microbatch drops the same entries
    mean_loss = lambda w: sum(loss_fn({"w": w, "key": key}, x) for x in halves) / len(halves)
    clipped = optax.chain(optax.clip_by_global_norm(0.5), TX) if options else TX
    now, state, w, kept = params, step.init(params, X), W, clipped.init(W)
    for _ in range(2):
        now, state, *_ = jax.jit(step)(now, state, X)
        updates, kept = clipped.update(jax.grad(mean_loss)(w), kept, w)
        w = optax.apply_updates(w, updates)
    assert relative_error(now["w"], w) < 1e-6
    assert jnp.array_equal(jax.random.key_data(now["key"]), jax.random.key_data(key))


@pytest.mark.parametrize("keys", always(KEYS, ["one a layer"]))
def test_the_unfused_step_and_a_donating_one_take_them_too(keys):
    params = {"w": W + 0.0, "key": jax.random.clone(KEYS[keys])}
    step = fuse(loss_fn, TX)
    state = step.init(params, X)
    unfused = jax.jit(step.unfused)(params, state, X)
    fused = step.jit(params, state, X)
    assert relative_error(fused.params["w"], unfused.params["w"]) < 1e-6
    assert "key" in str(step.plan(fused.params, X)) and step.saved_bytes(fused.params, X) > 0


def test_refuses_to_train_them():
    with pytest.raises(ValueError, match="'key' is of key<fry>"):
        fuse(loss_fn, TX, trainable=lambda path: True).init({"w": W, "key": KEYS["one"]}, X)
