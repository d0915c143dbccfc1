"""Each of Optax's optimizers in the fused step equals plain Optax on separate layers, or is refused by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import RELATIVE_ERROR, relative_error
from tiers import always

from adalomo_jax import fuse

STEPS, LAYERS = 3, ("w0", "w1")
contrib = optax.contrib
LR = optax.linear_schedule(0.1, 0.01, STEPS)


def every_second(step, **_):
    return step % 2 == 0


def plateau():
    """The loss grows, so the scale falls in the second step."""
    return optax.chain(optax.sgd(-0.5), contrib.reduce_on_plateau(patience=1, factor=0.5))


def matrices(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "b", params)


ACCEPTED: dict[str, Callable[[], optax.GradientTransformation]] = {
    **{
        name: lambda name=name: getattr(optax, name)(0.1)
        for name in (
            *("adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan", "amsgrad"),
            *(
                "fromage",
                "lamb",
                "lars",
                "lion",
                "nadam",
                "nadamw",
                "novograd",
                "optimistic_adam",
                "optimistic_adam_v2",
            ),
            *("optimistic_gradient_descent", "radam", "rmsprop", "rprop", "sgd", "sign_sgd", "signum", "sm3", "yogi"),
        )
    },
    **{
        f"contrib.{name}": lambda name=name: getattr(contrib, name)(0.1)
        for name in (
            *("acprop", "ademamix", "adopt", "galore", "madgrad", "muon", "schedule_free_adamw", "schedule_free_sgd"),
            "simplified_ademamix",
        )
    },
    "contrib.cocob": contrib.cocob,
    "contrib.reduce_on_plateau": plateau,
    "conditionally_transform": lambda: optax.conditionally_transform(optax.adam(0.1), every_second),
    "conditionally_mask": lambda: optax.conditionally_mask(optax.adam(0.1), every_second),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(LR), 2).gradient_transformation(),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(LR),
    "masked by path": lambda: optax.adamw(LR, weight_decay=0.1, mask=matrices),
    "clips each tensor": lambda: optax.chain(optax.clip_by_block_rms(0.01), optax.adaptive_grad_clip(0.1)),
    "centralize": lambda: optax.chain(optax.centralize(), optax.trace(0.9), optax.scale_by_learning_rate(LR)),
}
ALWAYS = [
    *("adafactor", "adamw", "contrib.muon", "contrib.reduce_on_plateau", "MultiSteps", "inject_hyperparams"),
]
"""These differ in what they keep, what they ask for, and which parts of a tensor they look at."""
MIXES = "tx mixes leaves: the update of 'a' depends on the gradient of"
REFUSED: dict[str, tuple[Callable[[], optax.GradientTransformation], str]] = {
    "polyak_sgd": (lambda: optax.polyak_sgd(0.1), MIXES),
    "lbfgs": (optax.lbfgs, "such as a line search"),
    "backtracking": (lambda: optax.scale_by_backtracking_linesearch(10), "such as a line search"),
    "noisy_sgd": (lambda: optax.noisy_sgd(0.1, key=0), "tx draws random numbers"),
    **{
        f"contrib.{name}": (lambda name=name: getattr(contrib, name)(0.1), MIXES)
        for name in ("dadapt_adamw", "dog", "dowg", "momo", "momo_adam", "prodigy")
    },
    "contrib.mechanize": (lambda: contrib.mechanize(optax.adam(0.1)), MIXES),
    "contrib.sophia": (lambda: contrib.sophia(0.1), "obj_fn must be provided"),
    "contrib.sam": (
        lambda: contrib.sam(optax.sgd(0.1), optax.sgd(0.1)),
        r"tx\.update must accept keyword arguments that it does not know",
    ),
    "MultiSteps of what is finite": (
        lambda: optax.MultiSteps(
            optax.adam(0.1), 2, should_skip_update_fn=optax.skip_not_finite
        ).gradient_transformation(),
        MIXES,
    ),
    "monitor": (
        lambda: optax.monitor({"norm": optax.tree.norm}),
        r"state\.measurements\['norm'\] is not what tx\.init",
    ),
    "snapshot": (lambda: optax.snapshot("norm", optax.tree.norm), r"its state\.measurement\['norm'\] depends on the"),
}


def params_apart() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 3), "b": (3,), **dict.fromkeys(LAYERS, (3, 3))}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def stacked(params):
    return {"a": params["a"], "b": params["b"], "layers": jnp.stack([params[name] for name in LAYERS])}


X = jnp.asarray(np.random.default_rng(1).standard_normal((5, 4)), jnp.float32)


def loss_apart(params):
    x = X @ params["a"] + params["b"]
    for name in LAYERS:
        x = x + jnp.tanh(x @ params[name])
    return jnp.mean(x**2)


def loss_fn(params):
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), X @ params["a"] + params["b"], params["layers"])
    return jnp.mean(x**2)


def train_apart(tx):
    """The parameters, and the state by path, by plain Optax."""
    tx, params = optax.with_extra_args_support(tx), params_apart()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_apart)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    return stacked(params), dict(jax.tree_util.tree_leaves_with_path(state))


def stacked_state(like, state):
    """The state of separate layers, under the paths of the stacks' state."""
    of_layer = lambda path, name: tuple(jax.tree_util.DictKey(name) if k == stack else k for k in path)
    stack = jax.tree_util.DictKey("layers")
    in_stack = lambda path: jnp.stack([state[of_layer(path, name)] for name in LAYERS])
    return [in_stack(path) if stack in path else state[path] for path, _ in jax.tree_util.tree_leaves_with_path(like)]


@pytest.mark.parametrize("name", always(ACCEPTED, ALWAYS))
def test_equals_plain_optax_on_the_layers_apart(name: str):
    tx = ACCEPTED[name]()
    step = fuse(loss_fn, tx)
    params, jitted = stacked(params_apart()), jax.jit(step)
    state = step.init(params)
    for _ in range(STEPS):
        params, state, *_ = jitted(params, state)
    expected, expected_state = train_apart(tx)
    assert relative_error(params, expected) < RELATIVE_ERROR
    assert relative_error(jax.tree.leaves(state.inner), stacked_state(state.inner, expected_state)) < RELATIVE_ERROR
    if name == "contrib.reduce_on_plateau":
        inner: Any = state.inner
        assert inner[1].scale < 1


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_it_cannot_compute(name: str):
    make, message = REFUSED[name]
    step = fuse(loss_fn, make())
    params = stacked(params_apart())
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda params: step(params, step.init(params)), params)
