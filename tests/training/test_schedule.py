"""Learning rates follow the schedule, and every named optimizer descends and decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalomo_jax.rules import RULES
from adalomo_jax.training.config import FinetuneConfig
from adalomo_jax.training.schedule import make_schedule


def learning_rates(**options):
    config = FinetuneConfig(steps=10, learning_rate=1.0, **options)
    return np.asarray(jax.vmap(make_schedule(config))(jnp.arange(11)))


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("constant", np.ones(7)),
        ("linear", 1 - np.arange(7) / 6),
        ("cosine", (1 + np.cos(np.pi * np.arange(7) / 6)) / 2),
    ],
)
def test_schedules_rise_and_fall(schedule, after):
    rates = learning_rates(schedule=schedule, warmup_steps=4)
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates[4:], after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("warmup_steps", "first"), [(0, 1.0), (1, 1.0), (10, 0.1), (None, 1.0)])
def test_the_first_step_moves(warmup_steps, first):
    np.testing.assert_allclose(learning_rates(warmup_steps=warmup_steps)[0], first, rtol=1e-6)


@pytest.mark.parametrize("optimizer", RULES)
def test_every_optimizer_descends_and_decays(optimizer):
    params = {"w": jnp.full((4, 4), 2.0)}
    gradients = {"w": jnp.ones((4, 4))}

    def moved(**options):
        config = FinetuneConfig(steps=10, optimizer=optimizer, warmup_steps=0, **options)
        tx = RULES[config.optimizer].make(make_schedule(config), config.weight_decay)
        updates, _ = tx.update(gradients, tx.init(params), params)
        return float(jax.tree.leaves(updates)[0][0, 0])

    assert moved(weight_decay=0.5) < moved() < 0


@pytest.mark.parametrize("optimizer", [name for name in RULES if name != "lomo"])
def test_moments_are_float32_of_bfloat16_weights(optimizer):
    config = FinetuneConfig(steps=10, optimizer=optimizer, dtype="bfloat16")
    tx = RULES[config.optimizer].make(make_schedule(config), config.weight_decay)
    state = jax.eval_shape(tx.init, {"w": jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)})
    floats = {str(x.dtype) for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {"float32"}
