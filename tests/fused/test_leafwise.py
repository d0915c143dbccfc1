"""A transformation that mixes leaves is refused, by name; one that does not is not."""

import jax
import jax.numpy as jnp
import optax
import pytest

from adalomo_jax import adalomo, fuse, lomo

PARAMS = {"a": jnp.ones((3, 2)), "layers": jnp.ones((4, 2, 2))}


def loss_fn(params):
    x, _ = jax.lax.scan(lambda x, w: (x @ w, None), params["a"], params["layers"])
    return jnp.sum(x)


def share_momentum():
    """Mixes leaves through the state only: this step's update of one depends on earlier gradients of all."""

    def update(updates, state, params=None):
        del params
        mean = sum(jnp.mean(g) for g in jax.tree.leaves(updates))
        return jax.tree.map(lambda g: g * state, updates), 0.9 * state + mean

    return optax.GradientTransformation(lambda params: jnp.zeros([]), update)


def record_norm():
    """Leaves the updates alone, but keeps the norm of all of them."""
    return optax.GradientTransformation(
        lambda params: jnp.zeros([]), lambda updates, state, params=None: (updates, optax.tree.norm(updates))
    )


MIXING = {
    "global norm": (optax.clip_by_global_norm(1.0), "the update of 'a' depends on the gradient of 'layers'"),
    "late in a chain": (optax.chain(adalomo(1e-2), optax.clip_by_global_norm(1.0)), "the update of 'a'"),
    "accumulation": (optax.MultiSteps(adalomo(1e-2), 2).gradient_transformation(), "tx mixes leaves"),
    "finite check": (optax.apply_if_finite(adalomo(1e-2), 3), "tx mixes leaves"),
    "through the state": (share_momentum(), "tx mixes leaves"),
    "random numbers": (optax.noisy_sgd(1e-3, key=0), "draws random numbers"),
    "layer_axes": (adalomo(1e-2, layer_axes={"a": None, "layers": 0}), "leave layer_axes out of tx"),
    "in the state only": (record_norm(), "its state depends on the gradients of 'a', 'layers'"),
}


@pytest.mark.parametrize("name", MIXING)
def test_refuses_what_mixes_leaves(name):
    tx, message = MIXING[name]
    with pytest.raises(ValueError, match=message):
        fuse(loss_fn, tx).init(PARAMS)


SEPARATE = {
    "adalomo": adalomo(optax.linear_schedule(1e-2, 0.0, 10), weight_decay=0.1),
    "lomo": lomo(1e-2, clip_value=1.0),
    "adafactor": optax.adafactor(1e-3),
    "nadamw": optax.nadamw(1e-3),
    "lamb": optax.lamb(1e-3),
    "adaptive clipping": optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(1e-2)),
    "block clipping": optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(1e-2, momentum=0.9, nesterov=True)),
    "inject_hyperparams": optax.inject_hyperparams(optax.lion)(learning_rate=optax.constant_schedule(1e-3)),
    "multi_transform": optax.multi_transform({"x": adalomo(1e-2), "y": optax.adam(1e-3)}, {"a": "x", "layers": "y"}),
    "schedule-free": optax.contrib.schedule_free_adamw(1e-3),
}


def test_refuses_it_with_the_state_of_another():
    plain, clipped = optax.identity(), optax.clip_by_global_norm(1e-3)
    state = fuse(loss_fn, optax.chain(plain, optax.sgd(1.0))).init(PARAMS)
    with pytest.raises(ValueError, match="tx mixes leaves"):
        fuse(loss_fn, optax.chain(clipped, optax.sgd(1.0)))(PARAMS, state)


@pytest.mark.parametrize("name", SEPARATE)
def test_accepts_what_treats_leaves_separately(name):
    step = fuse(loss_fn, SEPARATE[name])
    state = step.init(PARAMS)
    assert jax.tree.structure(jax.eval_shape(step, PARAMS, state).state) == jax.tree.structure(state)
