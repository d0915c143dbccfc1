"""Models as others wrote them equal the unfused step, are updated where expected, and need one layer's memory.

The tests compile one fused and one unfused program for each model and check everything on these.
"""

import functools

import pytest
from comparison import RELATIVE_ERROR, RULES, copied, relative_error, run_both
from compiled import compile_steps, tree_bytes
from found_model import Sizes
from models_as_found import MODELS
from tiers import always

from adalomo_jax import adalomo, fuse

pytestmark = pytest.mark.uncached

SMALL = Sizes()
WIDE_AND_DEEP = Sizes(layers=24, dim=64, batch=1, length=8)
"""A layer is 4% of its stack, and activations are small beside it."""
ALWAYS = ["nnx scan"]
"""The others are as slow; tests of scans and of lists have what differs in them."""
WITHOUT_STACKS = ["nnx list", "read by two scans", "shared layer"]
WITH_STACKS = [name for name in MODELS if name not in WITHOUT_STACKS]


def each_of(names):
    return pytest.mark.parametrize("name", always(names, ALWAYS))


@functools.cache
def model(name):
    return MODELS[name](SMALL if name == "nnx list" else WIDE_AND_DEEP)


@functools.cache
def compiled(name):
    return compile_steps(model(name), adalomo(1e-2))


@functools.cache
def memory(name):
    return compiled(name).memory


@each_of(MODELS)
def test_equals_the_unfused_step(name):
    """This also holds if layers compute in bfloat16: fused and unfused round alike, and no bit was seen to differ."""
    (_, params, batch, *_), state, fused, unfused, _ = compiled(name)
    results = []
    for program in (fused, unfused):
        now = copied((params, state))
        for i in range(3):
            result = program(*now, *batch(i))
            now = result[:2]
        results.append(result)
    assert relative_error(*results) < RELATIVE_ERROR
    assert relative_error(results[0].params, params) > 100 * RELATIVE_ERROR


@pytest.mark.slow
@pytest.mark.parametrize("name", ["experts mixed", "scalars and empty"])
def test_equals_the_unfused_step_of_adamw(name):
    loss_fn, params, batch, _, has_aux = MODELS[name](SMALL)
    fused, unfused = run_both(loss_fn, RULES["adamw"], params, [batch(i) for i in range(5)], has_aux=has_aux)
    assert relative_error(fused, unfused) < RELATIVE_ERROR
    assert relative_error(fused.params, params) > 100 * RELATIVE_ERROR


@each_of(MODELS)
def test_is_updated_where_one_expects(name):
    found = model(name)
    plan = fuse(found.loss_fn, adalomo(1e-2), has_aux=found.has_aux).plan(found.params, *found.batch(0))
    assert {leaf.path: leaf.layers for leaf in plan.leaves} == {
        leaf.path: found.layers_of(leaf.path) for leaf in plan.leaves
    }
    assert len(found.stacks) >= len(found.layered) and (found.stacks != []) == (name in WITH_STACKS)


@each_of(MODELS)
def test_costs_the_flops_of_the_unfused_step(name):
    fused, unfused = compiled(name).flops
    assert 0.99 < fused / unfused < 1.01


@each_of(WITH_STACKS)
def test_parameters_and_state_are_updated_in_place(name):
    assert memory(name).updated_in_place >= memory(name).params_and_state


@each_of(WITH_STACKS)
def test_gradients_of_stacks_never_exist(name):
    assert memory(name).saved >= 0.9


@each_of(WITH_STACKS)
def test_no_stack_is_cast_at_once(name):
    assert memory(name).narrow_stacks == []


def test_gradients_of_what_is_updated_whole_do_exist():
    """The comparison of temporaries shows them for a stack that two scans read."""
    found, both = model("read by two scans"), memory("read by two scans")
    assert both.temporaries_unfused - both.temporaries < 0.1 * tree_bytes(found.params["layers"])


def test_the_search_for_casts_finds_them():
    """The unfused step of a loss that casts the tree has them."""
    name = "linen axis 1 cast"
    shapes = [sorted(x.shape) for x in model(name).stacks]
    found = memory(name).narrow_stacks_unfused
    cast = [sorted(map(int, array[len("bf16[") : -1].split(","))) for array in found]
    assert all(shape in cast for shape in shapes)
