"""In ``jax.shard_map`` the step is data parallel as plain Optax is, or is refused in a sentence."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from comparison import relative_error
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tiers import always

from adalomo_jax import fuse

DEVICES = 4
X = jnp.sin(jnp.arange(64.0)).reshape(16, 4)
W = 0.3 * jax.random.normal(jax.random.key(0), (3, 4, 4))
PARAMS = {"embed": W[0] + jnp.eye(4), "w": W, "b": jnp.linspace(0.1, 0.5, 12).reshape(3, 4), "layers": jnp.arange(3)}
SGD = optax.sgd(0.1, momentum=0.9)
OPTIONS = {"plain": {}, "clipped": {"max_grad_norm": 0.1}, "microbatches": {"microbatches": 2, "rms_metrics": True}}


def loss_fn(params, x):
    """Reads `embed` twice: its gradient comes from both sides of the scan."""
    layer = jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w[0] + w[1]), None))
    h = lax.scan(layer, x @ params["embed"], (params["w"], params["b"]))[0]
    return jnp.mean((h @ params["embed"].T - x) ** 2)


def mean_loss(params, x):
    return lax.pmean(loss_fn(params, x), "batch")


def sharded(fn, *specs, **options):
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=P(), **options))


@functools.cache
def by_optax(clips):
    """The parameters after two steps, and the norm of the last gradient, without shards and without this package."""
    tx = optax.chain(optax.clip_by_global_norm(0.1), SGD) if clips else SGD

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss_fn)(params, X)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, optax.tree.norm(grads)

    params = trained(PARAMS)
    params, state, _ = step(params, tx.init(params))
    params, _, norm = step(params, state)
    return params, norm


def trained(params):
    return {name: x for name, x in params.items() if name != "layers"}


def run(step, **options):
    """The parameters after two steps, and the norm of the last gradient."""
    state = sharded(step.init, P(), P("batch"), **options)(PARAMS, X)
    on_mesh = sharded(step, P(), P(), P("batch"), **options)
    first = on_mesh(PARAMS, state, X)
    second = on_mesh(first.params, first.state, X)
    return trained(second.params), second.metrics["grad_norm"]


@pytest.mark.parametrize("options", always(OPTIONS, ["clipped", "microbatches"]))
def test_equals_optax_on_the_whole_batch(options):
    actual = run(fuse(mean_loss, SGD, **OPTIONS[options]))
    assert relative_error(actual, by_optax(clips=options == "clipped")) < 1e-6


def test_without_types_of_what_varies_gradients_are_averaged_in_tx():
    """With ``check_vma=False`` JAX sums nothing by itself, not even in `jax.grad`."""
    mean = optax.stateless(lambda g, _: jax.tree.map(lambda g: lax.pmean(g, "batch"), g))
    actual, _ = run(fuse(mean_loss, optax.chain(mean, SGD)), check_vma=False)
    assert relative_error(actual, by_optax(clips=False)[0]) < 1e-6


def test_refuses_a_loss_that_differs_from_device_to_device():
    step = fuse(loss_fn, SGD)
    with pytest.raises(ValueError, match=r"the loss must be the same .* jax.lax.pmean\(loss, \('batch',\)\)"):
        sharded(step.init, P(), P("batch"))(PARAMS, X)


def test_refuses_parameters_that_differ_from_device_to_device():
    step = fuse(mean_loss, SGD)
    with pytest.raises(ValueError, match=r"'embed' differs along the mesh axes \['batch'\]"):
        scaled = lambda p: {**p, "embed": p["embed"] * (1 + lax.axis_index("batch"))}
        sharded(lambda p, x: step.init(scaled(p), x), P(), P())(PARAMS, X)


def in_place(w, x):
    """`jax.grad` gives the right gradient, a part of which passes through the reference."""

    def layer(h, w):
        total = jax.new_ref(jnp.zeros([]))
        total[...] += jnp.sum(h)
        return jnp.tanh(h @ w) + total[...], None

    return jnp.mean(lax.scan(layer, x, w)[0])


def around(w, x):
    total = jax.new_ref(jnp.zeros([]))
    total[...] = jnp.mean(x)
    return jnp.mean(lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]) + total[...]


@pytest.mark.parametrize("loss_fn", [in_place, around])
def test_refuses_a_loss_that_changes_arrays_in_place(loss_fn):
    with pytest.raises(ValueError, match="The loss uses references"):
        fuse(loss_fn, SGD).init(W, X)
