"""Small steps of narrow weights are on average as large as the rule intends, compared with NumPy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import slow

from adalomo_jax import adalomo, fuse, lomo

SHAPE = (512, 512)
RATES = [1e-3, 1e-4, 1e-5]


def schedule(count):
    return jnp.take(jnp.array(RATES), count)


def after_adalomo(p, g, lr):
    rms = lambda x: np.sqrt(np.mean(x**2))
    s = g**2
    u = g / np.sqrt(s.mean(1, keepdims=True) * s.mean(0, keepdims=True) / s.mean())
    return p - lr * max(1e-3, rms(p)) * u / max(1, rms(u))


RULES = {
    "adalomo": (adalomo(schedule), after_adalomo),
    "lomo": (lomo(schedule), lambda p, g, lr: p - lr * g),
    "adamw": (optax.adamw(schedule, weight_decay=0.0), lambda p, g, lr: p - lr * np.sign(g)),
}
"""Each rule, with the weights after a step. Each step has the same gradients, so AdaLomo and Adam keep a direction."""


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [("adalomo", "bfloat16"), slow("adamw", "float16"), slow("lomo", "bfloat16")]
    + [slow("adalomo", "float16"), slow("adamw", "bfloat16"), slow("lomo", "float16")],
)
def test_the_mean_movement_is_the_intended_one(rule, dtype):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.choice([-1, 1], shape) * rng.choice([0.5, 1.0, 2.0], shape), dtype)
    params = {"head": 0.02 * rng.standard_normal(SHAPE), "layers": 0.02 * rng.standard_normal((2, *SHAPE))}
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), params)
    grads = {"head": draw(*SHAPE), "layers": draw(2, *SHAPE)}

    def loss_fn(params, grads):
        dot = lambda p, g: jnp.sum(p.astype(jnp.float32) * g.astype(jnp.float32))
        body = lambda sum_, xs: (sum_ + dot(*xs), None)
        return jax.lax.scan(body, dot(params["head"], grads["head"]), (params["layers"], grads["layers"]))[0]

    tx, after = RULES[rule]
    step = fuse(loss_fn, tx)
    run, state = jax.jit(step), step.init(params, grads)
    for lr in RATES:
        before = [np.asarray(params["head"], np.float64), *np.asarray(params["layers"], np.float64)]
        params, state, *_ = run(params, state, grads)
        now = [np.asarray(params["head"], np.float64), *np.asarray(params["layers"], np.float64)]
        of_each = [np.asarray(grads["head"], np.float64), *np.asarray(grads["layers"], np.float64)]
        arrived, error = share_that_arrived(before, now, of_each, partial(after, lr=lr), dtype)
        assert error < 0.03
        assert abs(arrived - 1) < 5 * error + 0.005, (lr, arrived)


def share_that_arrived(before, now, grads, after, dtype):
    """The share of the intended movement, along its direction, and the standard error of a fair rounding."""
    intended = np.stack([after(p, g) - p for p, g in zip(before, grads)])
    spacing = float(jnp.finfo(dtype).eps) * 2.0 ** np.floor(np.log2(np.abs(before) + 2.0**-20))
    rest = np.abs(intended) % spacing
    variance = np.sum(intended**2 * rest * (spacing - rest))
    return np.sum((np.stack(now) - before) * intended) / np.sum(intended**2), np.sqrt(variance) / np.sum(intended**2)


def test_state_that_tx_gives_back_as_it_was_is_not_written():
    """AdaLomo uses no `v` for a matrix, and no `v_row` and `v_col` for a vector: each would cost a write per layer."""
    params, x = {"bias": jnp.ones((3, 4)), "w": jnp.ones((3, 4, 4))}, jnp.ones((2, 4))
    body = lambda x, p: (jnp.tanh(x @ p["w"] + p["bias"]), None)
    step = fuse(lambda params, x: jnp.sum(jax.lax.scan(body, x, params)[0]), adalomo(1e-3))
    state = step.init(params, x)
    written = str(jax.make_jaxpr(step)(params, state, x)).count("f32[3,1] = dynamic_update_slice")
    assert sum(leaf.shape == (3, 1) for leaf in jax.tree.leaves(state)) == 3 and written == 0
    assert "f32[3,4] = dynamic_update_slice" in str(jax.make_jaxpr(step)(params, state, x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_tx_is_given_float32_gradients_of_what_is_rounded_stochastically(dtype):
    """A step that the weights' dtype cannot represent is therefore not lost before it is rounded."""
    given = []

    def update(updates, state, params=None):
        given.extend(g.dtype for g in jax.tree.leaves(updates))
        return updates, state

    params = {"layers": jnp.ones((2, 3, 3), dtype), "head": jnp.ones(3, dtype)}
    loss = lambda p, x: jnp.sum(jax.lax.scan(lambda h, w: (h @ w, None), x, p["layers"])[0] * p["head"])
    x, tx = jnp.ones((2, 3), dtype), optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    for is_rounded, rounding in ((True, None), (False, False)):
        step = fuse(loss, tx, stochastic_rounding=rounding)
        state = step.init(params, x)
        given.clear()
        jax.eval_shape(step, params, state, x)
        assert given.count(jnp.float32) == (2 if is_rounded else 0)
