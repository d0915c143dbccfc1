"""What the compiler says of the fused step: memory, copies, FLOPs."""

import re

import flops
import jax
import jax.numpy as jnp
import optax
import pytest
from language_model import REMATS, batch, init_params, make_loss

from adalomo_jax import adalomo, fuse, lomo

DIM, HIDDEN, LENGTH, BATCH = 128, 256, 64, 2
RULES = {
    "adalomo": adalomo(1e-2),
    "lomo": lomo(1e-2),
    "adamw": optax.adamw(1e-3),
    "sgd with momentum": optax.sgd(1e-2, momentum=0.9),
}


def tree_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compile_step(layers, rule, remat="remat", dtype=jnp.float32, unfused=False):
    params = init_params(layers, dim=DIM, hidden=HIDDEN, vocab=64, dtype=dtype)
    tokens = batch(batch_size=BATCH, length=LENGTH, vocab=64)
    step = fuse(make_loss(remat), RULES[rule])
    state = step.init(params, tokens)
    jitted = jax.jit(step.unfused, donate_argnums=(0, 1)) if unfused else step.jit
    return jitted.lower(params, state, tokens).compile(), params, state


def memory_of(compiled):
    sizes = compiled.memory_analysis()
    assert sizes is not None
    return sizes


def compiled_flops(fn, args):
    costs = jax.jit(fn).lower(*args).compile().cost_analysis()
    assert costs is not None
    return costs["flops"]


def copies_of_stacks(compiled, stacks):
    """Copies, anywhere in the program, of arrays with the shape of a stack."""
    shapes = {",".join(map(str, x.shape)) for x in jax.tree.leaves(stacks)}
    found = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", compiled.as_text())
    return [shape for shape in found if shape in shapes]


@pytest.mark.parametrize(
    ("rule", "remat", "dtype"),
    [(rule, remat, jnp.float32) for rule in RULES for remat in ("no remat", "remat", "dots saved")]
    + [(rule, remat, jnp.bfloat16) for rule in ("adalomo", "adamw") for remat in ("no remat", "remat")],
)
def test_parameters_and_state_are_updated_in_place(rule, remat, dtype):
    compiled, params, state = compile_step(5, rule, remat, dtype)
    assert memory_of(compiled).alias_size_in_bytes >= tree_bytes((params, state))
    matrices = [x for x in jax.tree.leaves(params["layers0"]) if x.ndim == 3]
    assert copies_of_stacks(compiled, matrices) == []


def test_the_search_for_copies_finds_one():
    """The unfused step, or any that writes the new stack beside the old one, shows up."""
    stack = jnp.ones((5, DIM, HIDDEN))
    compiled = jax.jit(lambda s: (s.at[0].add(1.0), s * 2.0), donate_argnums=0).lower(stack).compile()
    assert copies_of_stacks(compiled, [stack]) != []


@pytest.mark.parametrize("rule", RULES)
def test_temporaries_grow_by_the_saved_layer_inputs(rule):
    shallow, deep = (memory_of(compile_step(layers, rule)[0]).temp_size_in_bytes for layers in (4, 16))
    saved = (16 - 4) * BATCH * LENGTH * DIM * 4
    assert deep - shallow <= 1.1 * saved


def test_temporaries_of_the_unfused_step_grow_by_the_gradients_too():
    shallow, deep = (memory_of(compile_step(n, "adalomo", unfused=True)[0]).temp_size_in_bytes for n in (4, 16))
    params = init_params(16 - 4, dim=DIM, hidden=HIDDEN, vocab=64)
    assert deep - shallow > tree_bytes(params["layers0"])


@pytest.mark.parametrize("remat", REMATS)
def test_matrix_multiplications_are_those_of_the_unfused_step(remat):
    params, tokens = init_params([4, 3]), batch()
    step = fuse(make_loss(remat), adalomo(1e-2))
    args = params, step.init(params, tokens), tokens
    assert flops.count(step, *args) == flops.count(step.unfused, *args) > 0


def test_recomputation_is_counted():
    params, tokens = init_params(4), batch()
    counts = []
    for remat in ("no remat", "remat"):
        step = fuse(make_loss(remat), adalomo(1e-2))
        counts.append(flops.count(step, params, step.init(params, tokens), tokens))
    assert counts[1] > 1.1 * counts[0]


@pytest.mark.parametrize("remat", ["no remat", "remat", "dots saved"])
def test_compiled_flops_are_those_of_the_unfused_step(remat):
    """Of all operations, by XLA's count, on a program whose loops are unrolled."""
    params = init_params([4, 3], dim=DIM, hidden=HIDDEN)
    tokens = batch(length=LENGTH)
    step = fuse(make_loss(remat, unroll=True), adalomo(1e-2))
    args = params, step.init(params, tokens), tokens
    fused, unfused = map(compiled_flops, (step, step.unfused), [args, args])
    assert 0.99 < fused / unfused < 1.01
