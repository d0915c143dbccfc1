"""Models as others wrote them: equal to the unfused step, updated where one expects, in the memory of one layer."""

import functools

import flops
import jax
import pytest
from comparison import RELATIVE_ERROR, RULES, relative_error, run_both
from compiled import memory_of_steps, tree_bytes
from found_model import Sizes
from models_as_found import MODELS

from adalomo_jax import adalomo, fuse

WIDE_AND_DEEP = Sizes(layers=48, dim=64, batch=1, length=8)
"""A layer is 2% of its stack, and activations are small beside it."""
WITH_STACKS = [name for name in MODELS if name not in ("nnx list", "read by two scans", "shared layer")]


@functools.cache
def model(name):
    return MODELS[name](Sizes())


@functools.cache
def memory(name):
    # Code that is compiled faster and runs slower needs the same memory.
    options = {"xla_backend_optimization_level": 0}
    return memory_of_steps(MODELS[name](WIDE_AND_DEEP), adalomo(1e-2), compiler_options=options)


def assert_equal(name, rule):
    """Also where layers compute in bfloat16: fused and unfused round alike, and no bit was seen to differ."""
    loss_fn, params, batch, _, has_aux = model(name)
    fused, unfused = run_both(loss_fn, RULES[rule], params, [batch(i) for i in range(5)], has_aux=has_aux)
    assert relative_error(fused, unfused) < RELATIVE_ERROR
    assert relative_error(fused.params, params) > 100 * RELATIVE_ERROR


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_unfused_step(name):
    assert_equal(name, "adalomo")


@pytest.mark.parametrize("name", ["experts mixed", "scalars and empty"])
def test_equals_the_unfused_step_of_adamw(name):
    assert_equal(name, "adamw")


@pytest.mark.parametrize("name", MODELS)
def test_is_updated_where_one_expects(name):
    found = model(name)
    plan = fuse(found.loss_fn, adalomo(1e-2), has_aux=found.has_aux).plan(found.params, *found.batch(0))
    assert {leaf.path: leaf.layers for leaf in plan.leaves} == {
        leaf.path: found.layers_of(leaf.path) for leaf in plan.leaves
    }
    assert len(found.stacks) >= len(found.layered) and (found.stacks != []) == (name in WITH_STACKS)


@pytest.mark.parametrize("name", MODELS)
def test_costs_the_flops_of_the_unfused_step(name):
    loss_fn, params, batch, _, has_aux = model(name)
    step = fuse(loss_fn, adalomo(1e-2), has_aux=has_aux)
    args = (params, jax.eval_shape(step.init, params, *batch(0)), *batch(0))
    assert 0.99 < flops.count(step, *args) / flops.count(step.unfused, *args) < 1.01


@pytest.mark.parametrize("name", WITH_STACKS)
def test_parameters_and_state_are_updated_in_place(name):
    assert memory(name).updated_in_place >= memory(name).params_and_state


@pytest.mark.parametrize("name", WITH_STACKS)
def test_gradients_of_stacks_never_exist(name):
    assert memory(name).saved >= 0.9


@pytest.mark.parametrize("name", WITH_STACKS)
def test_no_stack_is_cast_at_once(name):
    assert memory(name).narrow_stacks == []


def test_gradients_of_what_is_updated_whole_do_exist():
    """The comparison of temporaries, of a stack that two scans read."""
    found = MODELS["read by two scans"](WIDE_AND_DEEP)
    both = memory("read by two scans")
    assert both.temporaries_unfused - both.temporaries < 0.1 * tree_bytes(found.params["layers"])


def test_the_search_for_casts_finds_them():
    """In the unfused step of a loss that casts the tree."""
    shapes = {x.shape for x in MODELS["linen cast"](WIDE_AND_DEEP).stacks}
    found = memory("linen cast").narrow_stacks_unfused
    assert {f"bf16[{','.join(map(str, shape))}]" for shape in shapes} <= set(found)
