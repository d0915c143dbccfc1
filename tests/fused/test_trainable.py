"""A parameter that `trainable` freezes costs no gradient, no state and no write."""

import functools

import chex
import flops
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from apart import run_fused, train
from comparison import RELATIVE_ERROR, RULES, relative_error, run_both
from compiled import memory_of, tree_bytes
from language_model import batch, init_params, layer, make_loss
from tiers import always

from adalomo_jax import fuse, lomo

BATCHES = [(batch(i),) for i in range(3)]
CHOICES = {
    "a tree": lambda p: jax.tree.map(lambda x: x.ndim > 2, p),
    "a prefix": lambda p: {"embed": True, "norm": False, "head": False, "layers0": True},
    "a predicate": lambda p: lambda path: path.startswith("layers0/") and not path.endswith("scale"),
    "no stack": lambda p: lambda path: not path.startswith("layers"),
    "the embedding": lambda p: lambda path: path == "embed",
    "the head": lambda p: lambda path: path == "head",
}


def flags(params, trainable):
    """The choice as a tree of bools, made with `jax.tree` alone."""
    if callable(trainable):
        name = lambda path: "/".join(key.key for key in path)
        return jax.tree_util.tree_map_with_path(lambda path, _: trainable(name(path)), params)
    return jax.tree.map(lambda flag, below: jax.tree.map(lambda _: flag, below), trainable, params)


def frozen_by_optax(tx, chosen):
    """`tx` for the chosen parameters of separate layers; the others are frozen."""

    def labels(params):
        of = lambda name: chosen[name] if not name.startswith("layers") else [chosen[name]] * len(params[name])
        return jax.tree.map(lambda flag: "train" if flag else "freeze", {name: of(name) for name in params})

    return optax.multi_transform({"train": tx, "freeze": optax.set_to_zero()}, labels)


@pytest.mark.parametrize("choice", always(CHOICES, ["a predicate"]))
def test_equals_optax_with_the_rest_set_to_zero(choice):
    params = init_params(3)
    trainable = CHOICES[choice](params)
    chosen = flags(params, trainable)
    step = fuse(make_loss(), RULES["adamw"], trainable=trainable)
    result = run_fused(step, params, BATCHES)[-1]
    expected, _, _ = train(make_loss(), frozen_by_optax(RULES["adamw"], chosen), params, BATCHES)
    assert relative_error(result.params, expected) < RELATIVE_ERROR
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), result.params, params)
    assert moved == chosen  # frozen parameters are unchanged, and all others moved


@pytest.mark.parametrize("choice", always(CHOICES, ["a tree", "a predicate", "no stack"]))
def test_what_is_frozen_costs_no_gradient(choice):
    """The FLOPs are those of ``jax.grad`` with respect to the trained parameters only."""
    params, tokens = init_params(3), batch()
    trainable = CHOICES[choice](params)
    chosen = flags(params, trainable)
    leaves, treedef = jax.tree.flatten(params)
    kept = jax.tree.leaves(chosen)

    def loss_of_trained(trained):
        trained = iter(trained)
        return make_loss()(treedef.unflatten([next(trained) if k else x for k, x in zip(kept, leaves)]), tokens)

    expected = flops.count(jax.value_and_grad(loss_of_trained), [x for k, x in zip(kept, leaves) if k])
    step, all_trained = (fuse(make_loss(), RULES["lomo"], trainable=t) for t in (trainable, None))
    count = lambda step: flops.count(step, params, step.init(params, tokens), tokens)
    assert count(step) == expected < count(all_trained)


@pytest.mark.parametrize("choice", always(CHOICES, ["a prefix", "a predicate", "no stack"]))
def test_what_is_frozen_has_no_state_and_is_not_written(choice):
    params, tokens = init_params(3, dim=48, hidden=80), batch()
    trainable = CHOICES[choice](params)
    step = fuse(make_loss(), RULES["adamw"], trainable=trainable)
    state = step.init(params, tokens)
    trained = [x for x, k in zip(jax.tree.leaves(params), jax.tree.leaves(flags(params, trainable))) if k]
    arrays = [x.shape for x in jax.tree.leaves(state.inner) if x.ndim]
    assert sorted(arrays) == sorted([x.shape for x in trained] * 2)  # both moments of each
    jaxpr = jax.make_jaxpr(step)(params, state, tokens).jaxpr
    returned = jaxpr.outvars[: len(jax.tree.leaves(params))]
    same = [a is b for a, b in zip(jaxpr.invars, returned)]
    assert same == [not k for k in jax.tree.leaves(flags(params, trainable))]


def lora_loss(params, tokens):
    def body(x, w):
        frozen, adapter = w
        delta = jax.tree.map(lambda a, b: a @ b, *adapter)
        full = {name: p.astype(jnp.float32) + delta.get(name, 0.0) for name, p in frozen.items()}
        return layer(x, full), None

    x = params["embed"][tokens].astype(jnp.float32)
    x, _ = jax.lax.scan(jax.checkpoint(body), x, (params["layers0"], params["adapters"]))
    log_p = jax.nn.log_softmax(x @ params["head"].astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1))


def lora_params(layers=4, rank=2, **sizes):
    params = init_params(layers, dtype=jnp.bfloat16, **sizes)
    normal = lambda i, shape: np.random.default_rng(i).standard_normal(shape, np.float32)
    thin = lambda i, *shape: jnp.asarray(np.float32(0.1) * normal(i, (layers, *shape)))
    shapes = {name: params["layers0"][name].shape[1:] for name in ("mix", "up", "down")}
    down = {name: thin(i, shape[0], rank) for i, (name, shape) in enumerate(shapes.items())}
    up = {name: thin(9 + i, rank, shape[1]) for i, (name, shape) in enumerate(shapes.items())}
    return params | {"adapters": (down, up)}


def test_adapters_beside_a_frozen_stack_in_bfloat16():
    params, is_adapter = lora_params(), lambda path: path.startswith("adapters")
    fused, unfused = run_both(lora_loss, RULES["adamw"], params, BATCHES, trainable=is_adapter)
    assert relative_error(fused, unfused) < RELATIVE_ERROR
    assert relative_error(fused.params["adapters"], params["adapters"]) > 100 * RELATIVE_ERROR
    rest = lambda p: {name: x for name, x in p.items() if name != "adapters"}
    chex.assert_trees_all_equal(rest(fused.params), rest(params))
    plan = fuse(lora_loss, RULES["adamw"], trainable=is_adapter).plan(params, *BATCHES[0])
    assert {leaf.layers for leaf in plan.leaves if leaf.trained} == {4}


LORA_LENGTH, LORA_DIM = 16, 64


@functools.cache
def lora_memory(layers, loss_fn=lora_loss):
    params, tokens = lora_params(layers, dim=LORA_DIM, hidden=128), batch(length=LORA_LENGTH)
    step = fuse(loss_fn, RULES["adamw"], trainable=lambda path: path.startswith("adapters"))
    return memory_of(step.jit.lower(params, step.init(params, tokens), tokens).compile()), params


@pytest.mark.uncached
def test_a_frozen_stack_is_neither_copied_nor_cast():
    """Temporaries grow by the saved layer inputs, which are far smaller than the stack in either dtype."""
    (few, _), (many, params) = lora_memory(4), lora_memory(16)
    saved = (16 - 4) * 2 * LORA_LENGTH * LORA_DIM * 4
    added = many.temp_size_in_bytes - few.temp_size_in_bytes
    assert added <= 1.1 * saved < tree_bytes(params["layers0"]) / 4
    assert many.alias_size_in_bytes >= tree_bytes(params)


@pytest.mark.slow
@pytest.mark.uncached
def test_a_stack_that_the_loss_itself_casts_as_a_whole_is_seen():
    cast = lambda p: p | {"layers0": jax.tree.map(lambda x: x.astype(jnp.float32)[::-1], p["layers0"])}
    (few, params4), (many, params16) = (lora_memory(n, lambda p, t: lora_loss(cast(p), t)) for n in (4, 16))
    in_float32 = 2 * (tree_bytes(params16["layers0"]) - tree_bytes(params4["layers0"]))
    assert many.temp_size_in_bytes - few.temp_size_in_bytes > 0.9 * in_float32


PATHS = {
    "multi_transform": lambda label: optax.multi_transform({"a": optax.adamw(1e-3), "b": optax.sgd(1e-2)}, label),
    "masked": lambda label: optax.chain(
        optax.sgd(1e-2),
        optax.masked(optax.scale(3.0), lambda p: jax.tree.map(lambda x: x == "a", label(p))),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "trainable"),
    [(name, trainable) for name in ("multi_transform", "masked") for trainable in (None, lambda path: path != "norm")],
)
def test_transformations_by_path_are_as_in_plain_optax(name, trainable):
    """The labels use the names in a path, which are the same for a separate layer and for its stack."""

    def label(params):
        is_a = lambda path: any(getattr(key, "key", None) in ("mix", "embed") for key in path)
        return jax.tree_util.tree_map_with_path(lambda path, _: "a" if is_a(path) else "b", params)

    params, tx = init_params(3), PATHS[name](label)
    result = run_fused(fuse(make_loss(), tx, trainable=trainable), params, BATCHES)[-1]
    plain = frozen_by_optax(tx, flags(params, trainable)) if trainable else tx
    expected, _, _ = train(make_loss(), plain, params, BATCHES)
    assert relative_error(result.params, expected) < RELATIVE_ERROR


def test_integers_and_bools_beside_trainable_leaves():
    stack = {
        "w": 0.3 * jnp.ones((3, 4, 4)),
        "on": jnp.array([True, False, True]),
        "order": jnp.arange(12).reshape(3, 4) % 4,
    }
    params = {"layers": stack, "count": jnp.int32(3), "head": jnp.ones(4)}

    def loss_fn(params, x):
        body = lambda x, w: (jnp.where(w["on"], jnp.tanh(x[w["order"]] @ w["w"]), x), None)
        return jnp.sum(jax.lax.scan(body, x, params["layers"])[0] * params["head"]) / params["count"]

    x = jnp.linspace(0.1, 1.0, 4)
    fused, unfused = run_both(loss_fn, lomo(1e-2), params, [(x,)] * 3)
    assert relative_error(fused, unfused) < RELATIVE_ERROR
    for path in ("on", "order"):
        np.testing.assert_array_equal(fused.params["layers"][path], stack[path])
    assert fused.params["count"].dtype == jnp.int32 and fused.params["count"] == 3


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"])
def test_floats_of_8_bits_and_fewer_are_refused(dtype):
    params = {"narrow": jnp.zeros(3, dtype), "w": jnp.ones(3)}
    step = fuse(lambda p: jnp.sum(p["w"]), lomo(0.1))
    with pytest.raises(
        ValueError, match=f"of 16 bits at least, but 'narrow' is of {dtype}. Keep it in bfloat16"
    ) as error:
        step.init(params)
    assert "\n" not in str(error.value)
    fuse(lambda p: jnp.sum(p["w"]), lomo(0.1), trainable=lambda path: path == "w").init(params)
