"""The compiler confirms the memory, copies and FLOPs of the fused step."""

import flops
import jax
import jax.numpy as jnp
import pytest
from comparison import RULES
from compiled import copies_of_stacks, memory_of, tree_bytes
from language_model import REMATS, batch, init_params, make_loss
from tiers import always, slow

from adalomo_jax import adalomo, fuse

pytestmark = pytest.mark.uncached
LAYERS, DIM, HIDDEN, LENGTH, BATCH = 5, 128, 256, 64, 2


def compile_step(layers, rule, remat="remat", dtype=jnp.float32, unfused=False):
    params = init_params(layers, dim=DIM, hidden=HIDDEN, vocab=64, dtype=dtype)
    tokens = batch(batch_size=BATCH, length=LENGTH, vocab=64)
    step = fuse(make_loss(remat), RULES[rule])
    state = step.init(params, tokens)
    jitted = jax.jit(step.unfused, donate_argnums=(0, 1)) if unfused else step.jit
    return jitted.lower(params, state, tokens).compile(), params, state


def compiled_flops(fn, args):
    costs = jax.jit(fn).lower(*args).compile().cost_analysis()
    assert costs is not None
    return costs["flops"]


@pytest.mark.parametrize(
    ("rule", "remat", "dtype"),
    [
        ("adalomo", "remat", jnp.float32),
        slow("adalomo", "no remat", jnp.bfloat16),
        slow("lomo", "no remat", jnp.float32),
        slow("adamw", "dots saved", jnp.float32),
        slow("sgd with momentum", "remat", jnp.float32),
        slow("adamw", "remat", jnp.bfloat16),
        slow("adamw", "no remat", jnp.float32),
        slow("adalomo", "dots saved", jnp.float32),
        slow("adalomo", "remat", jnp.bfloat16),
    ],
)
def test_parameters_and_state_are_updated_in_place(rule, remat, dtype):
    compiled, params, state = compile_step(LAYERS, rule, remat, dtype)
    assert memory_of(compiled).alias_size_in_bytes >= tree_bytes((params, state))
    # The CPU computes bfloat16 in float32, and its compiler then does copy a stack of vectors (adamw, 1 kB).
    least_rank = 2 if dtype == jnp.float32 else 3
    stacks = [x for x in jax.tree.leaves((params, state)) if x.ndim >= least_rank and x.shape[0] == LAYERS]
    assert len(stacks) >= 3 and copies_of_stacks(compiled, stacks) == []


def test_the_search_for_copies_finds_one():
    """The program reads the old stack after it has written the new one in its place."""
    stack = jnp.ones((5, DIM, HIDDEN))
    compiled = jax.jit(lambda s: (s.at[0].add(1.0), s * 2.0), donate_argnums=0).lower(stack).compile()
    assert copies_of_stacks(compiled, [stack]) != []


@pytest.mark.parametrize("rule", always(RULES, ["adalomo"]))
def test_temporaries_grow_by_the_saved_layer_inputs(rule):
    shallow, deep = (memory_of(compile_step(layers, rule)[0]).temp_size_in_bytes for layers in (4, 16))
    saved = (16 - 4) * BATCH * LENGTH * DIM * 4
    assert deep - shallow <= 1.1 * saved


def test_what_is_the_same_in_each_layer_is_not_saved_for_each():
    """Without remat, the backward pass again needs a table that the body makes from constants alone."""
    table_bytes = 4 * LENGTH * LENGTH

    def loss_fn(params, x):
        def body(x, w):
            table = jnp.exp(-jnp.abs(jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH) * jnp.float32(0.5)))
            return jnp.sin(table @ x) @ w, None

        return jnp.sum(jax.lax.scan(body, x, params)[0])

    temporaries = []
    for layers in (4, 16):
        params, x = jnp.ones((layers, 8, 8)), jnp.ones((LENGTH, 8))
        step = fuse(loss_fn, adalomo(1e-2))
        compiled = step.jit.lower(params, step.init(params, x), x).compile()
        temporaries.append(memory_of(compiled).temp_size_in_bytes)
    saved = 2 * 4 * LENGTH * 8  # the cosine, and the sine that is multiplied
    assert temporaries[1] - temporaries[0] <= 1.1 * (16 - 4) * saved < (16 - 4) * table_bytes / 2


def test_temporaries_of_the_unfused_step_grow_by_the_gradients_too():
    shallow, deep = (memory_of(compile_step(n, "adalomo", unfused=True)[0]).temp_size_in_bytes for n in (4, 16))
    params = init_params(16 - 4, dim=DIM, hidden=HIDDEN, vocab=64)
    assert deep - shallow > tree_bytes(params["layers0"])


@pytest.mark.parametrize("remat", always(REMATS, ["remat"]))
def test_matrix_multiplications_are_those_of_the_unfused_step(remat):
    params, tokens = init_params([4, 3]), batch()
    step = fuse(make_loss(remat), adalomo(1e-2))
    args = params, step.init(params, tokens), tokens
    assert flops.count(step, *args) == flops.count(step.unfused, *args) > 0


@pytest.mark.slow
def test_recomputation_is_counted():
    params, tokens = init_params(4), batch()
    counts = []
    for remat in ("no remat", "remat"):
        step = fuse(make_loss(remat), adalomo(1e-2))
        counts.append(flops.count(step, params, step.init(params, tokens), tokens))
    assert counts[1] > 1.1 * counts[0]


@pytest.mark.parametrize("remat", [slow("remat"), slow("no remat"), slow("dots saved")])
def test_compiled_flops_are_those_of_the_unfused_step(remat):
    """XLA counts all operations, but a loop's body only once however often it runs: so the model has one layer."""
    params = init_params(1, dim=DIM, hidden=HIDDEN)
    tokens = batch(length=LENGTH)
    step = fuse(make_loss(remat), adalomo(1e-2))
    args = params, step.init(params, tokens), tokens
    assert 0.99 < compiled_flops(step, args) / compiled_flops(step.unfused, args) < 1.01
