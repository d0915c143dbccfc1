"""Where the buffers of a program lie, and what a TPU deals out beside them."""

import jax
import jax.numpy as jnp
import pytest
from traced import ARRAY, SQUARE, STACK, temporaries, tpu, traced

from adalomo_jax.memory.placement import Chip, table_bytes

SCALAR = 4


def chain(x):
    return jnp.sum(((x @ x) @ x) @ x)


def around(x, xs):
    """A matmul's result is read after a loop."""
    kept = x @ x
    return jnp.sum(jax.lax.scan(lambda total, x: (total + jnp.sum(x), None), 0.0, xs)[0] + kept @ kept)


def test_vector_memory_has_what_fits_between_loops():
    assert temporaries(chain, SQUARE, chip=tpu(0)) == 2 * ARRAY
    assert temporaries(chain, SQUARE, chip=tpu(ARRAY)) == ARRAY
    assert temporaries(chain, SQUARE, chip=tpu(ARRAY - 1)) == 2 * ARRAY
    assert temporaries(chain, SQUARE, chip=tpu(2 * ARRAY)) == SCALAR


def test_vector_memory_has_what_outlives_a_loop_only_where_it_has_room_for_all():
    assert ARRAY <= temporaries(around, SQUARE, STACK, chip=tpu(2**20)) < 2 * ARRAY
    assert temporaries(around, SQUARE, STACK, chip=tpu(2**20, holds_all=True)) <= 4 * SCALAR


def test_vector_memory_has_no_matmul_that_becomes_an_output():
    assert temporaries(lambda x: x + x @ x, SQUARE, in_place={0: 0}.items(), chip=tpu(2**20)) == ARRAY


@pytest.mark.parametrize("cores, main", [(1, SCALAR), (2, ARRAY)])
def test_two_cores_meet_in_main_memory_until_the_first_that_reads(cores, main):
    kept = lambda x: jnp.sum((y := x @ x) @ x @ x @ y)
    elementwise = lambda x: jnp.sum(jnp.tanh(x @ x) @ x)
    for fn in (chain, kept, elementwise):
        assert temporaries(fn, SQUARE, chip=tpu(2**20, cores=cores)) == main
    assert temporaries(kept, SQUARE, chip=tpu(0, cores=cores)) == 3 * ARRAY


def test_a_scalar_lies_in_main_memory_and_takes_a_granule():
    fn = lambda x: jnp.sum(x @ x)
    assert temporaries(fn, SQUARE, chip=tpu(2**20, granule=2**14)) == 2**14
    assert temporaries(fn, SQUARE, chip=tpu(0, granule=2**13)) == ARRAY + 2**13
    assert temporaries(lambda x: jnp.sum(x @ x, axis=0), SQUARE, chip=tpu(2**20, granule=2**14)) == 0


def tables(fn, *shapes):
    """Of the operations in it, without those of its arguments."""
    return table_bytes(traced(fn, *shapes), Chip("tpu", granule=1)) - len(shapes)


def test_reductions_of_one_array_are_one_operation_if_none_needs_another():
    assert tables(lambda x: jnp.sum(x, 0), SQUARE) == 0
    assert tables(lambda x: (jnp.sum(x, 0), jnp.max(x * x, 1)), SQUARE) == 1
    assert tables(lambda x: jnp.sum((x - jnp.sum(x, 0)) ** 2, 1), SQUARE) == 0


def test_so_are_those_of_a_matmuls_result_and_the_matmul():
    assert tables(lambda x: x @ x, SQUARE) == 0
    assert tables(lambda x: jnp.sum(x @ x, 0), SQUARE) == 1


def test_loops_parts_and_words_of_a_key_have_a_table():
    assert tables(lambda xs: jax.lax.scan(lambda c, x: (c + x, None), jnp.zeros(SQUARE), xs)[0], STACK) == 1
    assert tables(lambda x: jnp.concatenate([x * 2, x + 1]), SQUARE) == 1
    drawn = lambda x: x + jax.random.uniform(jax.random.fold_in(jax.random.key(0), 1), SQUARE)
    assert tables(drawn, SQUARE) == 1


def test_so_has_what_is_written_and_read_besides():
    update = lambda row, g: (new := jnp.tanh(row) + g, jnp.sum(g @ new))
    assert tables(update, SQUARE, SQUARE) - tables(lambda row, g: jnp.sum(g @ (row + g)), SQUARE, SQUARE) == 1
    assert tables(lambda row, g: (row + g, g * 2), SQUARE, SQUARE) == 0
