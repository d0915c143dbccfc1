"""No step promotes implicitly: steps trace under ``jax_numpy_dtype_promotion=strict`` and rank promotion ``raise``."""

import jax
import jax.numpy as jnp
import optax
import pytest
from tiers import slow

from adalomo_jax import DynamicLossScale, adalomo, apply_updates, fuse, lomo

RULES = {
    "adalomo": lambda: adalomo(1e-2, weight_decay=0.1),
    "lomo": lambda: lomo(1e-2, clip_value=1.0, weight_decay=0.1),
    "adamw": lambda: optax.adamw(1e-3),
}
OPTIONS = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.1},
    "microbatches": {"microbatches": 2},
    "dynamic": {"loss_scale": DynamicLossScale(), "rms_metrics": True},
    "all": {"loss_scale": 8.0, "microbatches": 2, "max_grad_norm": 1, "reduction": "sum"},
    "written": {"skip_nonfinite": False, "stochastic_rounding": False},
}


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def loss_fn(params, x):
    """`embed` is read on both sides of the scan, `b` is the same in each iteration."""
    layer = jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w) + params["b"][None], None))
    h = jax.lax.scan(layer, x @ params["embed"], params["w"])[0]
    return jnp.mean((h @ params["embed"].T - x) ** 2)


def params_and_batch(dtype):
    params = {"w": jnp.full((3, 4, 4), 0.1), "embed": jnp.eye(4), "b": jnp.zeros(4)}
    return jax.tree.map(lambda x: x.astype(dtype), (params, jnp.ones((4, 4))))


CASES = [("bfloat16", "adalomo", "all")]
CASES += [slow("bfloat16", "adalomo", options) for options in OPTIONS if options != "all"]
CASES += [slow("bfloat16", rule, options) for rule in RULES if rule != "adalomo" for options in OPTIONS]
CASES += [slow(dtype, "adalomo", options) for dtype in ("float16", "float32") for options in ("plain", "all")]


@pytest.mark.parametrize("twin", ["fused", "unfused"])
@pytest.mark.parametrize(("dtype", "rule", "options"), CASES)
def test_a_step_traces(dtype, rule, options, twin):
    params, x = params_and_batch(dtype)
    step = fuse(loss_fn, RULES[rule](), **OPTIONS[options])
    state = step.abstract_state(params, x)
    result = jax.eval_shape(step if twin == "fused" else step.unfused, params, state, x)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (result.params, result.state)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), (params, state)
    )


@pytest.mark.parametrize("rule", ["adalomo", "lomo"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_rule_by_itself_traces(dtype, rule):
    params, x = params_and_batch(dtype)

    def step(params, x):
        tx = RULES[rule]()
        updates, _ = tx.update(jax.grad(loss_fn)(params, x), tx.init(params), params)
        return apply_updates(params, updates, key=jax.random.key(0)), apply_updates(params, updates)

    assert jax.eval_shape(step, params, x)[0]["w"].dtype == dtype
