"""The NNX adapter updates a model and an optimizer in place, and holds nothing twice."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from adalomo_jax import adalomo, fuse
from adalomo_jax.nnx import FusedOptimizer

WIDTH, LAYERS, VOCAB = 8, 3, 5
TOKENS = jax.random.randint(jax.random.key(0), (4, 6), 0, VOCAB)
TRANSFORMATIONS = {"adalomo": adalomo(1e-2), "adamw": optax.adamw(1e-2)}


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(jnp.tanh(self.norm(self.linear(x))))


def stack(make, layers, rngs) -> Any:
    """Layers whose Variables are stacked on the first axis."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_each(rngs):
        return make(rngs)

    return make_each(rngs)


class Model(nnx.Module):
    """Scanned layers; the embedding is also the head."""

    def __init__(self, rngs, layers=LAYERS, tied=True):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = stack(Block, layers, rngs)
        self.head = self.embed if tied else nnx.Embed(VOCAB, WIDTH, rngs=rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def layer(x, block):
            return block(x)

        return self.head.attend(layer(self.embed(tokens), self.layers))


def loss_fn(model, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens)[:, :-1], tokens[:, 1:]).mean()


@functools.cache
def initial():
    return nnx.split(nnx.jit(lambda: Model(nnx.Rngs(0)))())


def make(name="adalomo", loss_fn=loss_fn, batch: Any = (TOKENS,), **options):
    graphdef, state = initial()
    model: Any = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
    return model, FusedOptimizer(model, TRANSFORMATIONS[name], loss_fn, *batch, **options)


@functools.cache
def template(name):
    return nnx.split(make(name))


def start(name="adalomo") -> tuple[Any, Any]:
    """A fresh model and its optimizer. Optimizers of one name share one step, which compiles once."""
    graphdef, state = template(name)
    return nnx.merge(graphdef, jax.tree.map(jnp.copy, state))


def run(model, optimizer, steps):
    return [float(optimizer.step(model, TOKENS).loss) for _ in range(steps)]


def arrays(node, *filters):
    return jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(node, *filters)))


def floats(node, kind):
    return [x for x in jax.tree.leaves(arrays(node, kind)) if jnp.issubdtype(x.dtype, jnp.floating)]


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.slow
def test_equals_fuse_and_its_unfused_twin():
    model, optimizer = start()
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    states = jax.tree.map(jnp.copy, nnx.as_pure(states))

    def functional(params, tokens, state):
        model = nnx.merge(graphdef, params, state)
        return loss_fn(model, tokens), nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))

    losses = run(model, optimizer, 4)
    step = fuse(functional, TRANSFORMATIONS["adalomo"], has_aux=True)
    for call in map(jax.jit, (step, step.unfused)):
        params, state = states
        fused_state, expected = step.init(params, TOKENS, state), []
        for _ in range(4):
            params, fused_state, loss, state, _ = call(params, fused_state, TOKENS, state)
            expected.append(float(loss))
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        chex.assert_trees_all_close(arrays(model, nnx.Param), params, rtol=1e-5, atol=1e-6)
        opt_state = nnx.as_pure(optimizer.opt_state).inner
        chex.assert_trees_all_close(opt_state, fused_state.inner, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("skips_a_step", [False, True])
def test_equals_an_nnx_optimizer(skips_a_step):
    """The model's state is equal too: the same dropout masks, the same running means."""
    model, optimizer = start("adamw")
    theirs, _ = start("adamw")
    reference = nnx.Optimizer(theirs, TRANSFORMATIONS["adamw"], wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_fn)(model, TOKENS)
        optimizer.update(model, grads)
        return loss

    run(model, optimizer, 4)
    for _ in range(3 if skips_a_step else 4):
        train(theirs, reference)
    pairs = [(floats(model, kind), floats(theirs, kind)) for kind in (nnx.Param, nnx.BatchStat)]
    equal = [np.allclose(a, b, 1e-4, 1e-5) for ours, theirs in pairs for a, b in zip(ours, theirs)]
    assert not any(equal) if skips_a_step else all(equal)
    assert (model.layers.dropout.rngs.count[...] == optimizer.count).all()


def test_layers_are_updated_one_by_one_and_a_tied_embedding_is_one_parameter():
    model, optimizer = start()
    layers = {leaf.path: leaf.layers for leaf in optimizer.plan(model, TOKENS).leaves}
    assert layers.pop("embed/embedding") is None
    assert set(layers.values()) == {LAYERS} and all(path.startswith("layers/") for path in layers)


def test_a_tied_embedding_stays_tied():
    model, optimizer = start()
    before = arrays(model.embed)
    run(model, optimizer, 1)
    assert model.head is model.embed
    assert (before["embedding"] != model.head.embedding[...]).all()


def test_many_steps_trace_once_for_each_structure():
    calls = []

    def counted(*args):
        calls.append(args)
        return loss_fn(*args)

    model, optimizer = make(loss_fn=counted)
    counts = []
    for switch in (lambda: None, lambda: None, model.eval, lambda: None, model.train, lambda: None):
        switch()
        before = len(calls)
        run(model, optimizer, 2)
        counts.append(len(calls) - before)
    assert counts[0] == counts[2] and counts[0] > 0
    assert counts[1] == counts[3] == counts[4] == counts[5] == 0


@pytest.mark.uncached
def test_updates_in_place():
    model, optimizer = start("adamw")
    memory = optimizer.lower(model, TOKENS).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes((arrays(model, nnx.Param), arrays(optimizer)))


def test_the_old_arrays_are_gone_and_none_is_held_twice():
    model, optimizer = start()
    old = jax.tree.leaves(nnx.as_pure((nnx.state(model, nnx.Param), nnx.state(optimizer))))
    run(model, optimizer, 1)
    assert all(x.is_deleted() for x in old)
    assert not any(x.is_deleted() for x in jax.tree.leaves(nnx.as_pure((nnx.state(model), nnx.state(optimizer)))))


def test_is_part_of_the_users_jit():
    traces = []

    @nnx.jit(donate_argnums=(0, 1))
    def train(model, optimizer, tokens):
        traces.append(tokens)
        return optimizer.step(model, tokens).loss

    model, optimizer = start()
    losses = [float(train(model, optimizer, TOKENS)) for _ in range(3)]
    np.testing.assert_allclose(losses, run(*start(), 3), rtol=1e-5)
    assert len(traces) == 1 and int(optimizer.count) == 3


def test_restored_before_the_first_step_it_repeats_the_same_bits():
    model, optimizer = start()
    run(model, optimizer, 2)
    saved = arrays(model), arrays(optimizer)
    losses = run(model, optimizer, 2)
    again, its_optimizer = start()
    nnx.update(again, saved[0])
    nnx.update(its_optimizer, saved[1])
    assert int(its_optimizer.count) == 2
    assert run(again, its_optimizer, 2) == losses


def test_is_made_of_shapes():
    """An optimizer can be restored without ever making random weights."""
    model, optimizer = start()
    abstract, its_optimizer = nnx.eval_shape(lambda: make())
    shapes = lambda node: [(x.shape, x.dtype) for x in jax.tree.leaves(nnx.as_pure(nnx.state(node)))]
    assert shapes(its_optimizer) == shapes(optimizer)
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)
    from_shapes = FusedOptimizer(abstract, TRANSFORMATIONS["adalomo"], loss_fn, tokens)
    chex.assert_trees_all_equal(arrays(from_shapes), arrays(optimizer))


class LoraLayer(nnx.Module):
    def __init__(self, rngs):
        self.lora = nnx.LoRA(64, 2, 64, base_module=nnx.Linear(64, 64, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.lora(x))


@pytest.mark.slow
@pytest.mark.uncached
def test_frozen_parameters_are_read_and_not_copied():
    layers = stack(LoraLayer, LAYERS, nnx.Rngs(0))
    scanned = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    x = jnp.ones((2, 64))
    optimizer = FusedOptimizer(
        layers, adalomo(1e-2), lambda layers, x: jnp.mean(scanned(x, layers) ** 2), x, wrt=nnx.LoRAParam
    )
    assert {leaf.path for leaf in optimizer.plan(layers, x).leaves} == {"lora/lora_a", "lora/lora_b"}
    before, kernel = arrays(layers, nnx.LoRAParam), layers.lora.base_module.kernel[...]
    optimizer.step(layers, x)
    assert layers.lora.base_module.kernel[...] is kernel
    assert (before["lora"]["lora_b"] != layers.lora.lora_b[...]).all()
    memory = optimizer.lower(layers, x).compile().memory_analysis()
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < kernel.nbytes


def test_what_the_loss_makes_is_there_after_the_step_and_changes_the_model():
    class Remembers(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x):
            self.seen = nnx.Cache(jnp.sum(x))
            return self.linear(x)

    model, x = Remembers(nnx.Rngs(0)), jnp.ones((3, 2))
    model.seen = nnx.Cache(jnp.zeros([]))
    optimizer = FusedOptimizer(model, adalomo(1e-2), lambda model, x: model(x).mean(), x)
    for i in range(3):
        optimizer.step(model, i * x)
        assert isinstance(model.seen, nnx.Cache) and model.seen[...] == 6 * i
    model = Remembers(nnx.Rngs(0))
    optimizer = FusedOptimizer(model, adalomo(1e-2), lambda model, x: model(x).mean(), x)
    optimizer.step(model, x)
    with pytest.raises(ValueError, match=r"another structure than in init: .*'seen'.* is present now"):
        optimizer.step(model, x)


def test_a_loss_that_is_not_finite_leaves_the_running_means_as_they_were():
    model, optimizer = make(loss_fn=lambda model, tokens, scale: loss_fn(model, tokens) * scale, batch=(TOKENS, 1.0))
    before = arrays(model, nnx.BatchStat)
    optimizer.step(model, TOKENS, jnp.nan)
    chex.assert_trees_all_equal(arrays(model, nnx.BatchStat), before)
    assert (model.layers.dropout.rngs.count[...] == 1).all()


def test_aux_is_returned():
    model, optimizer = make(loss_fn=lambda model, tokens: (loss_fn(model, tokens), {"tokens": tokens}), has_aux=True)
    result = optimizer.step(model, TOKENS)
    assert result.params is None and result.state is None
    chex.assert_trees_all_equal(result.aux, {"tokens": TOKENS})


def test_options_reach_fuse():
    with pytest.raises(ValueError, match="stochastic_rounding=True"):
        run(*make(stochastic_rounding=True), 1)
    with pytest.raises(TypeError):
        make(no_such_option=1)


def test_microbatches_slice_the_batch_and_not_the_state():
    class Plain(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 1, use_bias=False, rngs=rngs)
            self.mean = nnx.BatchStat(jnp.zeros(3))
            self.calls = nnx.Variable(jnp.zeros([], jnp.int32))

        def __call__(self, x):
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * x.mean(0)
            self.calls[...] += 1
            return self.linear(x)

    x = jax.random.normal(jax.random.key(1), (6, 3))
    models = [Plain(nnx.Rngs(0)) for _ in range(2)]
    settings: list[dict[str, Any]] = [{}, {"microbatches": 3}]
    for model, options in zip(models, settings):
        optimizer = FusedOptimizer(model, adalomo(1e-2), lambda model, x: jnp.mean(model(x) ** 2), x, **options)
        for _ in range(2):
            optimizer.step(model, x)
    chex.assert_trees_all_close(*map(arrays, models), rtol=1e-5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Model(nnx.Rngs(0), layers=4), r"'layers/.*' was of the shape \(3, .*; in this one .* \(4, "),
        (lambda: Model(nnx.Rngs(0), tied=False), "'head/embedding' was not there; in this one it is of the shape"),
        (lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "in this one it is not there. Make a FusedOptimizer"),
    ],
)
def test_refuses_another_model(other, message):
    _, optimizer = start()
    with pytest.raises(ValueError, match=message):
        optimizer.step(other(), TOKENS)


@pytest.mark.parametrize(
    ("wrong", "options", "message"),
    [
        (lambda model, tokens: model(tokens), {}, "float scalar"),
        (lambda model, tokens: (loss_fn(model, tokens), tokens), {}, r"FusedOptimizer\(..., has_aux=True\)"),
        (loss_fn, {"has_aux": True}, r"must return \(loss, aux\)"),
    ],
)
def test_refuses_a_loss_that_is_no_scalar(wrong, options, message):
    with pytest.raises(ValueError, match=message):
        make(loss_fn=wrong, **options)


def test_refuses_a_filter_that_selects_nothing():
    with pytest.raises(ValueError, match="selects nothing"):
        make(wrt=nnx.LoRAParam)
