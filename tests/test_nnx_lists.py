"""The layers in an NNX model's Python lists are stacked between the steps; ``unplace`` gives them back to the model."""

import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_list_models import (
    LAYERS,
    STEPS,
    TX,
    WIDTH,
    Adapted,
    Model,
    Noisy,
    Plain,
    Reference,
    X,
    arrays,
    assert_equal,
    loss_fn,
)
from tiers import slow

from adalomo_jax import adalomo, nnx_stacks
from adalomo_jax.nnx import FusedOptimizer


def make(block: Any = Plain, wrt: Any = nnx.Param, remat=True, **options):
    model = Model(block, remat=remat)
    return model, FusedOptimizer(model, TX, loss_fn, X, roll=4, wrt=wrt, **options)


def stack_of(model):
    held: Any = model.layers[0].up.kernel.get_raw_value()
    return held.stack


def live_bytes():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def stacks(optimizer, model):
    return {leaf.path: leaf.layers for leaf in optimizer.plan(model, X).leaves if leaf.layer_paths}


@pytest.mark.parametrize(("block", "remat"), [(Noisy, True), slow(Plain, True), slow(Plain, False), slow(Noisy, False)])
def test_equals_an_nnx_optimizer(block, remat):
    """Weights, running means, dropout masks and counters are equal, also with an evaluation between the steps."""
    model, optimizer = make(block, remat=remat)
    reference = Reference(Model(block, remat=remat))
    before = arrays(model, nnx.Param)
    assert set(stacks(optimizer, model).values()) == {LAYERS}
    for i in range(STEPS):
        alone = optimizer.loss(model, X)  # with the masks that the step will have, and it changes nothing
        np.testing.assert_allclose([optimizer.step(model, X).loss, alone], [reference.step()] * 2, rtol=1e-5)
        if i == 2:
            optimizer.unplace(model)
            assert_equal(model, reference.model)
    optimizer.unplace(model)
    assert_equal(model, reference.model)
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), before, arrays(model, nnx.Param))
    assert min(jax.tree.leaves(moved)) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrt", "trainable"])
def test_frozen_weights_are_stacked_where_trainable_leaves_them_out(how):
    """``wrt`` makes them further arguments of the loss, which each step would have to stack again."""
    is_trained = lambda path: "lora_" in path
    options: dict[str, Any] = {"wrt": nnx.LoRAParam} if how == "wrt" else {"trainable": is_trained}
    model, optimizer = make(Adapted, **options)
    reference = Reference(Model(Adapted), nnx.LoRAParam)
    for _ in range(3):
        optimizer.step(model, X)
        reference.step()
    found = stacks(optimizer, model)
    assert len(found) == (0 if how == "wrt" else 4)
    assert all((n == LAYERS) == is_trained(path) for path, n in found.items())
    optimizer.unplace(model)
    assert_equal(model, reference.model)


@pytest.mark.slow
@pytest.mark.parametrize("jitted", [False, True])
def test_an_unplaced_model_is_evaluated_as_any_other(jitted):
    model, optimizer = make()
    reference = Reference(Model())
    evaluate = nnx.jit(loss_fn) if jitted else loss_fn
    for _ in range(2):
        optimizer.step(model, X)
        reference.step()
        optimizer.unplace(model)
        np.testing.assert_allclose(evaluate(model, X + 1), evaluate(reference.model, X + 1), rtol=1e-5)


READS = {
    "called": lambda model: model(X),
    "in nnx.jit": lambda model: nnx.jit(lambda model, x: model(x))(model, X),
    "in jax.jit": lambda model: jax.jit(lambda state: state)(nnx.state(model)),
    "differentiated": lambda model: nnx.grad(loss_fn)(model, X),
    "copied": lambda model: arrays(model),
    "indexed": lambda model: model.layers[1].up.kernel[0],
    "of NumPy": lambda model: np.asarray(model.layers[1].up.kernel[...]),
    "added to": lambda model: model.layers[1].up.kernel + 1,
    "multiplied": lambda model: X @ model.layers[0].up.kernel,
    "transposed": lambda model: model.layers[0].up.kernel.T,
    "written in part": lambda model: model.layers[0].up.kernel.__setitem__(0, 0.0),
    "given to an optimizer without stacks": lambda model: FusedOptimizer(model, TX, loss_fn, X),
}


@pytest.fixture(scope="module")
def stacked():
    model, optimizer = make()
    optimizer.step(model, X)
    return model


@pytest.mark.parametrize("read", READS)
def test_a_layer_in_a_stack_says_so_when_it_is_read(stacked, read):
    with pytest.raises((ValueError, AttributeError), match=r"is layer \d of a stack.*optimizer.unplace\(model\)"):
        READS[read](stacked)


def test_a_model_with_stacks_is_shown(stacked):
    assert "LayerInStack(layer 1 of 4, float32[8, 16])" in repr(stacked)
    assert stacked.layers[1].up.kernel.shape == (WIDTH, 2 * WIDTH)


def test_orbax_saves_no_layers_in_stacks(stacked, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    checkpointer = ocp.StandardCheckpointer()
    with pytest.raises(ValueError, match=r"optimizer.unplace\(model\)"):
        checkpointer.save(tmp_path / "model", nnx.state(stacked))


@pytest.mark.slow
def test_saved_and_restored_it_repeats_the_same_bits():
    model, optimizer = make()
    run = lambda model, optimizer: [float(optimizer.step(model, X).loss) for _ in range(2)]
    run(model, optimizer)
    optimizer.unplace(model)
    saved = arrays(model), arrays(optimizer)
    losses = run(model, optimizer)
    again, its_optimizer = make()
    nnx.update(again, saved[0])
    nnx.update(its_optimizer, saved[1])
    assert int(its_optimizer.count) == 2
    assert run(again, its_optimizer) == losses
    optimizer.unplace(model)
    its_optimizer.unplace(again)
    jax.tree.map(np.testing.assert_array_equal, arrays(again), arrays(model))


@pytest.mark.slow
def test_the_weights_are_there_once():
    """All live arrays together hold them once: after a step, after ``unplace``, and after the next step."""
    model, optimizer = make()
    optimizer.step(model, X)
    optimizer.unplace(model)
    due = sum(x.nbytes for x in jax.tree.leaves(nnx.as_pure((nnx.state(model), nnx.state(optimizer)))))
    weights = sum(x.nbytes for x in jax.tree.leaves(nnx.as_pure(nnx.state(model.layers))))
    others = live_bytes() - due
    for _ in range(2):
        optimizer.step(model, X)
        assert live_bytes() - others < due + weights / 10
        optimizer.unplace(model)
        assert live_bytes() - others < due + weights / 10
    copy = arrays(model)
    assert live_bytes() - others >= due + weights and copy


@pytest.mark.slow
def test_layers_are_copied_a_stack_at_a_time(monkeypatch):
    """Only one stack is alive beside the weights, when it is made and when its layers are copied out of it."""
    model, optimizer = make()
    optimizer.step(model, X)
    optimizer.unplace(model)
    due, seen = live_bytes(), []
    largest = LAYERS * model.layers[0].up.kernel[...].nbytes

    def recording(copy):
        def recorded(x):
            copied = copy(x)
            seen.append(live_bytes() - due)
            return copied

        return recorded

    for name in ("stack", "unstack"):
        monkeypatch.setattr(nnx_stacks, name, recording(getattr(nnx_stacks, name)))
    optimizer.step(model, X)
    optimizer.unplace(model)
    assert len(seen) == 2 * 4 and 0.9 * largest < max(seen) < 1.2 * largest


@pytest.mark.slow
@pytest.mark.parametrize("unplaced", [False, True])
def test_what_is_written_between_the_steps_counts(unplaced):
    """The next step uses the weights written to all layers or to one, whether the layers are stacked or not."""
    model, optimizer = make()
    reference = Reference(Model())
    for i in range(3):
        optimizer.step(model, X)
        reference.step()
        if unplaced:
            optimizer.unplace(model)
        of_one = {"layers": {1: {"up": {"kernel": jnp.full((WIDTH, 2 * WIDTH), 0.1 * (i + 1))}}}}
        new = of_one if i else jax.tree.map(lambda x: x + 0.1, arrays(Model()))
        nnx.update(model, jax.tree.map(jnp.copy, new))
        nnx.update(reference.model, new)
    optimizer.unplace(model)
    assert_equal(model, reference.model)


@pytest.mark.slow
def test_is_part_of_the_users_jit():
    """Arrays go in and come out."""
    train = nnx.jit(lambda model, optimizer, x: optimizer.step(model, x).loss)
    model, optimizer = make()
    reference = Reference(Model())
    for _ in range(3):
        np.testing.assert_allclose(train(model, optimizer, X), reference.step(), rtol=1e-5)
    assert_equal(model, reference.model)


def test_a_model_without_layers_that_repeat_stays_as_it_is():
    model = Model(layers=1)
    optimizer = FusedOptimizer(model, TX, loss_fn, X, roll=True)
    reference = Reference(Model(layers=1))
    for _ in range(2):
        optimizer.step(model, X)
        reference.step()
        assert_equal(model, reference.model)
    optimizer.unplace(model)
    assert_equal(model, reference.model)


@pytest.mark.slow
def test_without_roll_a_model_is_read_as_under_an_nnx_optimizer():
    model, reference = Model(), Reference(Model())
    optimizer = FusedOptimizer(model, TX, loss_fn, X)
    optimizer.step(model, X)
    reference.step()
    np.testing.assert_allclose(model(X), reference.model(X), rtol=1e-5)


def test_refuses_another_model():
    model, optimizer = make()
    optimizer.step(model, X)
    with pytest.raises(ValueError, match=r"'layers/4/.*' was not there; .* Make a FusedOptimizer for this model"):
        optimizer.step(Model(layers=5), X)


def test_a_copy_of_the_model_has_lost_its_weights_after_the_next_step():
    """The step donates its arrays, so they are gone wherever else they were kept."""
    model, optimizer = make()
    optimizer.step(model, X)
    copy = nnx.clone(model)
    optimizer.step(model, X)
    with pytest.raises(ValueError, match="was given to an earlier step"):
        optimizer.unplace(copy)


@pytest.mark.slow
def test_is_made_of_shapes():
    abstract, its_optimizer = nnx.eval_shape(lambda: make())
    model, optimizer = make()
    shapes = lambda node: [(x.shape, x.dtype) for x in jax.tree.leaves(nnx.as_pure(nnx.state(node)))]
    assert shapes(its_optimizer) == shapes(optimizer) and shapes(abstract) == shapes(model)


@pytest.mark.slow
@pytest.mark.parametrize("option", [{"max_grad_norm": 0.1}, {"microbatches": 2}, {"offload": "params"}])
def test_options_hold_for_stacks(option):
    """The results equal those without stacks."""
    model, optimizer = make(**option)
    of_list = Model()
    reference = FusedOptimizer(of_list, TX, loss_fn, X, **({} if "offload" in option else option))
    for _ in range(3):
        optimizer.step(model, X)
        reference.step(of_list, X)
    assert (stack_of(model).sharding.memory_kind == "pinned_host") == ("offload" in option)
    optimizer.unplace(model)
    assert_equal(model, of_list)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_layers_are_spread_as_they_were(axis_type):
    """An automatic mesh spreads the matrices, an explicit one the batch, because NNX layers gather nothing."""
    is_auto = axis_type == jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(axis_type,))
    spec = lambda x: jax.P("fsdp", None) if is_auto and x.ndim == 2 else jax.P()
    model, reference = Model(), Reference(Model())
    with jax.set_mesh(mesh):
        spread = lambda x: jax.device_put(x, jax.NamedSharding(mesh, spec(x)))
        nnx.update(model, jax.tree.map(spread, nnx.as_pure(nnx.state(model, nnx.Param))))
        x = jax.device_put(X, jax.NamedSharding(mesh, jax.P() if is_auto else jax.P("fsdp")))
        optimizer = FusedOptimizer(model, TX, loss_fn, x, roll=True)
        assert stacks(optimizer, model)
        for _ in range(2):
            optimizer.step(model, x)
            assert stack_of(model).sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P(None, *spec(X))), 3)
            optimizer.unplace(model)
            assert model.layers[2].up.kernel[...].sharding.is_equivalent_to(jax.NamedSharding(mesh, spec(X)), 2)
    for _ in range(2):
        reference.step()
    assert_equal(model, reference.model)


@pytest.mark.slow
def test_a_tx_of_which_a_layer_is_treated_otherwise():
    """The layer stays out of the stacks and can be read."""
    labels = lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, _: "slow" if path[1].key == 0 and path[0].key == "layers" else "fast", tree
    )
    tx = optax.multi_transform({"slow": optax.sgd(1e-3), "fast": adalomo(1e-2)}, labels)
    model = Model()
    optimizer = FusedOptimizer(model, tx, loss_fn, X, roll=True)
    optimizer.step(model, X)
    assert stacks(optimizer, model) and set(stacks(optimizer, model).values()) == {LAYERS - 1}
    assert model.layers[0].up.kernel[...].shape == (WIDTH, 2 * WIDTH)


def test_a_tx_that_demands_an_argument_by_name():
    """Construction, too, asks ``tx`` which layers it treats alike. A step may give another value."""

    update: Any = lambda updates, state, params=None, *, rate, **_: (jax.tree.map(lambda g: -rate * g, updates), state)
    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    with pytest.raises(ValueError, match="was not given 'rate'"):
        FusedOptimizer(Model(), tx, loss_fn, X, roll=True)
    model, reference = Model(), Reference(Model(), tx=optax.sgd(0.2))
    optimizer = FusedOptimizer(model, tx, loss_fn, X, roll=True, extra_args={"rate": 0.1})
    optimizer.step(model, X, rate=0.2)
    reference.step()
    assert stacks(optimizer, model)
    optimizer.unplace(model)
    assert_equal(model, reference.model)
