"""A loss changes state beside the parameters as under `nnx.value_and_grad`, `nnx.Optimizer` and `nnx.jit`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiers import slow

from adalomo_jax.nnx import FusedOptimizer

WIDTH, STEPS = 8, 3
X = jax.random.normal(jax.random.key(0), (4, WIDTH))
TX = optax.sgd(0.1)


class Warms(nnx.Module):
    """A module whose first call sets an attribute that is not an array."""

    def __init__(self):
        self.linear, self.first = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), True

    def __call__(self, x):
        y = self.linear(x) * (0.5 if self.first else 1.0)
        self.first = False
        return y


class Teacher(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(1))
        self.norm = nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.norm(self.linear(x))


def make():
    """A model, and arguments that hold arrays, nodes, and both."""
    return Warms(), ({"x": X, "rngs": nnx.Rngs(dropout=7)}, (Teacher(), 0.5), nnx.metrics.Average())


def loss_fn(model, batch, distills, metric):
    teacher, weight = distills
    y = nnx.Dropout(0.5)(model(batch["x"]), rngs=batch["rngs"])
    loss = weight * jnp.mean(jnp.square(y - jax.lax.stop_gradient(teacher(batch["x"]))))
    metric.update(values=loss)
    return loss, y == 0


def plain(loss_fn) -> Any:
    """The plain NNX step without this package, under `nnx.jit`."""

    @nnx.jit
    def step(model, optimizer, *batch):
        (loss, aux), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, *batch)
        optimizer.update(model, grads)
        return loss, aux

    return step


def fused_step(model, optimizer, *batch):
    result = optimizer.step(model, *batch)
    return result.loss, result.aux


def run(step, model, optimizer, batch):
    """The losses and aux of the steps, and all final arrays of the model and the arguments except keys."""
    results = [step(model, optimizer, *batch) for _ in range(STEPS)]
    leaves = map(jnp.asarray, jax.tree.leaves(nnx.as_pure((nnx.state(model), batch))))
    return results, [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


@pytest.mark.parametrize("jit", [lambda f: f, slow(nnx.jit(donate_argnums=(0, 1)))], ids=["alone", "in nnx.jit"])
def test_keys_metrics_batch_norms_and_attributes_go_on_as_in_nnx(jit):
    theirs, batch = make()
    expected = run(plain(loss_fn), theirs, nnx.Optimizer(theirs, TX, wrt=nnx.Param), batch)
    model, own = make()
    optimizer = FusedOptimizer(model, TX, loss_fn, *own, has_aux=True)
    assert_close(run(jit(fused_step), model, optimizer, own), expected)
    assert own[0]["rngs"].dropout.count[...] == STEPS and own[2].compute() == batch[2].compute()
    assert model.first is theirs.first is False


def test_the_parameters_of_an_argument_are_read_and_neither_copied_nor_donated():
    model, batch = make()
    teacher, optimizer = batch[1][0], FusedOptimizer(model, TX, loss_fn, *batch, has_aux=True)
    kernel = teacher.linear.kernel[...]
    optimizer.step(model, *batch)
    assert teacher.linear.kernel[...] is kernel and not kernel.is_deleted()


def counting(loss_fn):
    """The loss, and a list that gets an entry each time the loss is traced."""
    traces: list[Any] = []

    def counted(model, *batch):
        traces.append(getattr(model, "first", None))
        return loss_fn(model, *batch)

    return counted, traces


def test_an_attribute_that_changes_once_compiles_twice():
    counted, traces = counting(lambda model, x: jnp.mean(model(x)))
    model = Warms()
    optimizer = FusedOptimizer(model, TX, counted, X)
    seen = []
    for first in (True, False, False, True):
        model.first = first
        traces.clear()
        optimizer.step(model, X)
        assert model.first is False
        seen.append(set(traces))
    assert seen == [{True}, {False}, set(), set()]


@dataclasses.dataclass
class Config:
    """A dataclass that compares by value, and so has no hash."""

    width: int = WIDTH
    scales: list[float] = dataclasses.field(default_factory=lambda: [1.0])
    names: dict[str, Any] = dataclasses.field(default_factory=dict)


class Configured(nnx.Module):
    def __init__(self, config):
        self.config = config
        self.linear = nnx.Linear(config.width, config.width, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(x) * self.config.scales[0]


@pytest.mark.slow
def test_an_attribute_without_a_hash_is_compared_by_its_value():
    square = lambda model, x: jnp.mean(jnp.square(model(x)))
    counted, traces = counting(square)
    model, theirs = Configured(Config()), Configured(Config())
    optimizer, reference = FusedOptimizer(model, TX, counted, X), nnx.Optimizer(theirs, TX, wrt=nnx.Param)
    for i in range(STEPS):
        traces.clear()
        model.config = Config()
        loss, _ = plain(lambda *args: (square(*args), None))(theirs, reference, X)
        np.testing.assert_allclose(optimizer.step(model, X).loss, loss, rtol=1e-5)
        assert bool(traces) == (i == 0)


def test_models_of_other_configs_share_no_program():
    """One optimizer steps them in turn: a new config compiles again, and one that equals an earlier config does not."""
    square = lambda model, x: jnp.mean(jnp.square(model(x)))
    counted, traces = counting(square)
    configs = [Config(), Config(scales=[2.0]), Config(names={"a": [1]}), Config(), Config(scales=[2.0])]
    optimizer = FusedOptimizer(Configured(Config()), TX, counted, X)
    seen = []
    for config in configs:
        traces.clear()
        model = Configured(config)
        expected = square(model, X)
        np.testing.assert_allclose(optimizer.step(model, X).loss, expected, rtol=1e-5)
        seen.append(bool(traces))
    assert seen == [True, True, True, False, False]


class Pair(nnx.Module):
    def __init__(self, model, other):
        self.model, self.other = model, other


def test_a_variable_that_the_model_shares_with_an_argument_is_one_parameter():
    """The result is that of one module that holds both, the form in which NNX takes them."""

    def make():
        model, other = Teacher(), Teacher()
        other.linear, other.norm.mean = model.linear, model.norm.mean
        return model, other

    product = lambda model, other, x: jnp.mean(model(x) * jnp.tanh(other(x)))
    pair = Pair(*make())
    train = plain(lambda pair, x: (product(pair.model, pair.other, x), None))
    is_trained = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("other")))
    reference = nnx.Optimizer(pair, TX, wrt=is_trained)
    expected = [train(pair, reference, X)[0] for _ in range(STEPS)]
    model, other = make()
    optimizer = FusedOptimizer(model, TX, product, other, X)
    losses = [optimizer.step(model, other, X).loss for _ in range(STEPS)]
    assert_close(losses, expected)
    assert other.linear is model.linear and other.norm.mean is model.norm.mean
    assert_close(*(jax.tree.leaves(nnx.as_pure(nnx.state(x))) for x in (Pair(model, other), pair)))


def test_a_loss_that_is_not_finite_leaves_the_floats_of_arguments_as_they_were():
    model, batch = make()
    optimizer = FusedOptimizer(model, TX, loss_fn, *batch, has_aux=True)
    (batch, (teacher, _), metric), mean = batch, batch[1][0].norm.mean[...]
    optimizer.step(model, batch, (teacher, jnp.nan), metric)
    assert (teacher.norm.mean[...] == mean).all() and metric.total[...] == 0
    assert batch["rngs"].dropout.count[...] == 1 and metric.count[...] == 1


def test_microbatches_slice_arrays_and_each_begins_with_the_same_nodes():
    """If a loss is linear in the batch, its metric and running mean are those of the whole batch."""

    class Mean(nnx.Module):
        def __init__(self):
            self.mean = nnx.BatchStat(jnp.zeros(WIDTH))

    def linear_loss(model, batch, metric):
        mean, rngs = batch["nodes"]
        mean.mean[...] = 0.9 * mean.mean[...] + 0.1 * batch["x"].mean(0)
        loss = jnp.mean(model(batch["x"])) + 0 * jax.random.uniform(rngs.noise())
        metric.update(values=loss)
        return loss, None

    def make():
        batch = {"x": X, "nodes": [Mean(), nnx.Rngs(noise=0)]}
        return nnx.Linear(WIDTH, 1, rngs=nnx.Rngs(0)), (batch, nnx.metrics.Average())

    theirs, batch = make()
    expected = run(plain(linear_loss), theirs, nnx.Optimizer(theirs, TX, wrt=nnx.Param), batch)
    model, own = make()
    optimizer = FusedOptimizer(model, TX, linear_loss, *own, has_aux=True, microbatches=2)
    assert_close(run(fused_step, model, optimizer, own), expected)


def test_plans_and_lowers_with_nodes_that_are_shapes():
    model, batch = nnx.eval_shape(lambda: make())
    batch[0]["x"] = jax.ShapeDtypeStruct(X.shape, X.dtype)
    optimizer = FusedOptimizer(model, TX, loss_fn, *batch, has_aux=True)
    assert [leaf.path for leaf in optimizer.plan(model, *batch).leaves] == ["linear/bias", "linear/kernel"]
    assert "aliasing_output" in optimizer.lower(model, *batch).as_text()
    assert model.first


def test_a_loss_that_raises_leaves_model_and_optimizer_usable():
    def fragile(model, x, fails):
        y = model(x)
        if fails is None:
            raise KeyError("of the loss")
        return jnp.mean(y)

    model = Warms()
    optimizer = FusedOptimizer(model, TX, fragile, X, 0)
    with pytest.raises(KeyError, match="of the loss"):
        optimizer.step(model, X, None)
    assert model.first and jnp.isfinite(optimizer.step(model, X, 0).loss)


def test_a_teacher_whose_parameters_the_loss_writes_goes_on_as_in_nnx():
    def averaging(model, teacher, x):
        teacher.kernel[...] = 0.9 * teacher.kernel[...] + 0.1 * model.kernel[...]
        return jnp.mean(jnp.square(model(x) - teacher(x))), None

    def make() -> list[Any]:
        return [nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(seed)) for seed in range(2)]

    theirs, teacher = make()
    expected = run(plain(averaging), theirs, nnx.Optimizer(theirs, TX, wrt=nnx.Param), (teacher, X))
    model, teacher = make()
    bias = teacher.bias[...]
    optimizer = FusedOptimizer(model, TX, averaging, teacher, X, has_aux=True)
    assert_close(run(fused_step, model, optimizer, (teacher, X)), expected)
    assert teacher.bias[...] is bias


@pytest.mark.parametrize("transform", [lambda f: f, nnx.remat], ids=["", "in a remat"])
def test_refuses_a_loss_that_writes_what_is_trained(transform):
    """`nnx.Optimizer` would update the normalized kernel, which is a different training."""
    model = nnx.WeightNorm(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    called = transform(lambda model, x: model(x))
    with pytest.raises(ValueError, match="The loss writes the parameter 'layer_instance/kernel'"):
        FusedOptimizer(model, TX, lambda model, x: jnp.mean(called(model, x)), X)


@pytest.mark.parametrize("is_made", [True, False])
def test_refuses_a_loss_that_makes_or_removes_parameters(is_made):
    def changing(model, x):
        y = model(x)
        if is_made:
            model.linear.extra = nnx.Param(jnp.zeros(3))
        else:
            del model.linear.bias
        return jnp.mean(y)

    path = "linear/extra" if is_made else "linear/bias"
    with pytest.raises(ValueError, match=f"it {'makes' if is_made else 'removes'} '{path}'"):
        FusedOptimizer(Warms(), TX, changing, X)


def test_one_array_in_two_parameters_is_refused():
    """An update in place would change the array twice. One Variable under two names is one parameter."""
    rngs = nnx.Rngs(0)
    model = nnx.Dict(a=nnx.Linear(4, 4, use_bias=False, rngs=rngs), b=nnx.Linear(4, 4, use_bias=False, rngs=rngs))
    model.b.kernel = nnx.Param(model.a.kernel[...])
    loss_fn = lambda model, x: jnp.mean(model.b(model.a(x)) ** 2)
    x = jnp.ones((2, 4))
    optimizer = FusedOptimizer(model, optax.sgd(0.1), loss_fn, x)
    with pytest.raises(ValueError, match=r"params\['a'\].* and params\['b'\].* are one array"):
        optimizer.step(model, x)
    model.b.kernel = model.a.kernel
    gradient = nnx.grad(loss_fn)(model, x)["a"]["kernel"][...]
    before = jnp.copy(model.a.kernel[...])
    FusedOptimizer(model, optax.sgd(0.1), loss_fn, x).step(model, x)
    np.testing.assert_allclose(model.b.kernel[...], before - 0.1 * gradient, rtol=1e-6)


def test_what_a_step_is_given_by_name_goes_to_update():
    def scaled(updates, state, params=None, *, rate=0.0, **extra_args):
        return jax.tree.map(lambda g: -rate * g, updates), state

    model, x = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
    loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
    gradient, before = nnx.grad(loss_fn)(model, x)["kernel"][...], jnp.copy(model.kernel[...])
    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), scaled)
    FusedOptimizer(model, tx, loss_fn, x).step(model, x, rate=0.5)
    np.testing.assert_allclose(model.kernel[...], before - 0.5 * gradient, rtol=1e-6)
