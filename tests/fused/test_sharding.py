"""The step on eight devices has the numbers of one. Parameters, state and gradients stay spread as they were."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import relative_error
from compiled import memory_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_model import DIM, HIDDEN, SPREADS, batch, init_params, make_loss, put, run
from tiers import slow

from adalomo_jax import adalomo, fuse, lomo

RULES = {"adalomo": adalomo(1e-2), "lomo": lomo(1e-1), "adamw": optax.adamw(1e-2)}
OPTIONS = {"max_grad_norm": 0.1, "microbatches": 2}
AXIS_TYPES = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


@functools.cache
def on_one_device(rule, **options):
    result, losses = run(fuse(make_loss(), RULES[rule], **options), init_params(), lambda args: args)
    return jax.tree.map(np.asarray, (result.params, result.state.inner)), losses, float(result.metrics["grad_norm"])


@functools.cache
def on_mesh(spread, axis_type, rule, **options):
    mesh = SPREADS[spread].mesh(AXIS_TYPES[axis_type])
    place = lambda args: put(args, (P("fsdp"), P("fsdp")), mesh)
    with jax.set_mesh(mesh):
        params = put(init_params(), SPREADS[spread].specs, mesh)
        return run(fuse(make_loss(axis_type == "explicit"), RULES[rule], **options), params, place)


PAIRS = [
    ("fsdp", "automatic", "adalomo"),
    slow("fsdp and tensor", "explicit", "adalomo"),
    slow("data", "explicit", "lomo"),
    slow("tensor", "automatic", "lomo"),
    slow("data", "automatic", "adalomo"),
    slow("fsdp", "explicit", "lomo"),
    slow("tensor", "explicit", "adalomo"),
    slow("fsdp and tensor", "automatic", "lomo"),
]
"""Any two of a spread, a kind of mesh axes and a rule occur together."""


@pytest.mark.parametrize(("spread", "axis_type", "rule"), PAIRS)
def test_numbers_are_those_of_one_device(spread, axis_type, rule):
    (params, inner), losses, norm = on_one_device(rule, **OPTIONS)
    result, losses_on_mesh = on_mesh(spread, axis_type, rule, **OPTIONS)
    assert relative_error(result.params, params) < 1e-5
    assert relative_error(result.state.inner, inner) < 1e-5
    np.testing.assert_allclose(losses_on_mesh, losses, rtol=1e-5)
    np.testing.assert_allclose(result.metrics["grad_norm"], norm, rtol=1e-5)


def test_the_comparison_sees_a_step_too_few():
    (params, _), _, _ = on_one_device("adalomo", **OPTIONS)
    mesh = SPREADS["fsdp"].mesh(AxisType.Auto)
    place = lambda args: put(args, (P("fsdp"), P("fsdp")), mesh)
    step = fuse(make_loss(), RULES["adalomo"], **OPTIONS)
    result, _ = run(step, put(init_params(), SPREADS["fsdp"].specs, mesh), place, steps=4)
    assert relative_error(result.params, params) > 1e-4


@pytest.mark.parametrize("axis_type", [slow("automatic"), "explicit"])
def test_parameters_and_state_stay_spread(axis_type):
    spread = SPREADS["fsdp and tensor"]
    result, _ = on_mesh("fsdp and tensor", axis_type, "adalomo", **OPTIONS)
    specs = jax.tree.map(lambda x: tuple(x.sharding.spec), (result.params, result.state.inner[0]))
    pad = lambda spec, x: (*spec, *(None,) * (x.ndim - len(spec)))
    expected = jax.tree.map(lambda x, spec: pad(spec, x), result.params, spread.specs)
    trimmed = lambda tree: jax.tree.map(
        trim, tree, is_leaf=lambda x: isinstance(x, tuple) and not hasattr(x, "_fields")
    )
    assert trimmed(specs[0]) == trimmed(expected)
    rows, columns, unused = (trimmed(getattr(specs[1], name)) for name in ("v_row", "v_col", "v"))
    assert (rows["layers"]["up"], columns["layers"]["up"]) == ((None, "fsdp"), (None, "tensor"))
    assert (rows["layers"]["down"], columns["layers"]["down"]) == ((None, "tensor"), (None, "fsdp"))
    assert (rows["embed"], columns["embed"]) == ((), ("fsdp",))
    assert unused["layers"]["up"] == unused["embed"] == ()


def trim(spec):
    """The spec without trailing Nones, which say nothing."""
    while spec and spec[-1] is None:
        spec = spec[:-1]
    return spec


@pytest.mark.uncached
@pytest.mark.parametrize("rule", ["adalomo", slow("adamw")])
def test_arguments_are_donated_where_they_lie(rule):
    compiled, params, state = compile_on_mesh("fsdp and tensor", RULES[rule])
    bytes_a_device = sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves((params, state))
    )
    assert memory_of(compiled).alias_size_in_bytes >= bytes_a_device


def compile_on_mesh(spread, tx, **options):
    """Compiles from shapes alone, as for absent devices."""
    mesh = SPREADS[spread].mesh(AxisType.Auto)
    described = lambda tree, specs: jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)), tree, specs
    )
    params = described(init_params(), SPREADS[spread].specs)
    args = described(batch(0), (P("fsdp"), P("fsdp")))
    step = fuse(make_loss(), tx, **options)
    state = step.abstract_state(params, *args)
    return step.jit.lower(params, state, *args).compile(), params, state


def all_reduced_shapes(compiled):
    found = re.findall(r" = \(?([^=]*?)\)? all-reduce(?:-start)?\(", compiled.as_text())
    return [tuple(map(int, dims.split(","))) for types in found for dims in re.findall(r"\[([\d,]+)\]", types)]


@pytest.mark.uncached
def test_gradients_of_matrices_are_never_whole():
    """Under FSDP each gradient is summed only where it is kept."""
    compiled, *_ = compile_on_mesh("fsdp", RULES["adalomo"])
    matrices = {(DIM, HIDDEN), (HIDDEN, DIM)}
    assert not matrices.intersection(all_reduced_shapes(compiled))
    compiled, *_ = compile_on_mesh("data", RULES["adalomo"])
    assert matrices <= set(all_reduced_shapes(compiled)) | {s[::-1] for s in all_reduced_shapes(compiled)}


def test_abstract_state_is_what_init_makes():
    mesh, spread = SPREADS["fsdp and tensor"].mesh(AxisType.Auto), SPREADS["fsdp and tensor"]
    params, args = put(init_params(), spread.specs, mesh), put(batch(0), (P("fsdp"), P("fsdp")), mesh)
    step = fuse(make_loss(), RULES["adamw"])
    state, abstract = step.init(params, *args), step.abstract_state(params, *args)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for x, shape in zip(jax.tree.leaves(state), jax.tree.leaves(abstract)):
        assert (x.shape, x.dtype) == (shape.shape, shape.dtype) and x.sharding.is_equivalent_to(shape.sharding, x.ndim)


def test_bfloat16_weights_get_the_same_bits():
    """Each device rounds its part with the bits that a single device would use."""
    spread, mesh = SPREADS["fsdp and tensor"], SPREADS["fsdp and tensor"].mesh(AxisType.Auto)
    params = init_params(jnp.bfloat16)
    loss_fn = lambda params, x: sum(jnp.sum(p.astype(jnp.float32)) for p in jax.tree.leaves(params)) * jnp.sum(x)
    step = fuse(loss_fn, lomo(1e-3))
    x = jnp.ones(2)
    expected = jax.jit(step)(params, step.init(params, x), x).params
    spread_params = put(params, spread.specs, mesh)
    actual = step.jit(spread_params, step.init(spread_params, x), x).params
    assert relative_error(actual, expected) == 0.0


def mesh_of(n):
    return jax.make_mesh((n,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])


SPREADINGS = {
    "from whole to spread": (P(), P(None, None, "d"), None),
    "from spread to whole": (P(None, "d"), P(), None),
    "from one axis to another": (P(None, "d"), P(None, None, "d"), None),
    "to fewer devices": (P(None, "d"), P(None, "d"), 2),
    "to one device": (P(None, "d"), None, None),
}


@pytest.mark.parametrize("case", SPREADINGS)
def test_says_that_the_state_was_made_for_parameters_that_were_spread_otherwise(case):
    then, now, fewer = SPREADINGS[case]
    on = lambda spec, n: NamedSharding(mesh_of(n), spec)
    step = fuse(lambda w, x: jnp.mean(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]), adalomo(1e-2))
    w, x = 0.1 * jnp.ones((3, 8, 8)), jnp.ones((2, 8))
    state = step.init(jax.device_put(w, on(then, 4)), x)
    moved = jax.device_put(w, jax.devices()[0] if now is None else on(now, fewer or 4))
    for call in (step, step.jit, step.unfused):
        with pytest.raises(
            ValueError, match="^params is sharded differently than when the state was made: .* then, .* now"
        ):
            call(moved, state, x)


def test_spread_alike_by_another_name_is_the_same():
    """The names of a mesh and its axes do not matter, nor does an axis of one device."""
    mesh = jax.make_mesh((4, 1), ("d", "e"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    other = jax.make_mesh((4,), ("f",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    step = fuse(lambda w, x: jnp.mean(x @ w), lomo(1e-2))
    w, x = jnp.ones((8, 8)), jnp.ones((2, 8))
    state = step.init(jax.device_put(w, NamedSharding(mesh, P("d", "e"))), x)
    result = step.jit(jax.device_put(w, NamedSharding(other, P("f"))), state, x)
    assert result.params.sharding.is_equivalent_to(NamedSharding(other, P("f")), 2)
    step.jit(result.params, result.state, x)


def test_says_that_a_batch_to_slice_is_spread_otherwise():
    mesh = mesh_of(4)
    step = fuse(lambda w, x: jnp.mean(x @ w), lomo(1e-2), microbatches=2)
    w, x = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P())), jnp.ones((8, 8))
    state = step.init(w, jax.device_put(x, NamedSharding(mesh, P())))
    with pytest.raises(ValueError, match=r"^args\[0\] is sharded differently than when the state was made: "):
        step.jit(w, state, jax.device_put(x, NamedSharding(mesh, P("d"))))
