"""``collectives_in`` counts what devices send each other in a compiled program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adalomo_jax.memory.collectives import Collectives, collectives_in
from adalomo_jax.models import make_mesh

pytestmark = pytest.mark.uncached


def compiled_text(fn, *shapes_and_specs):
    mesh = make_mesh({"fsdp": 8})
    args = [
        jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, P(*spec))) for s, spec in shapes_and_specs
    ]
    return jax.jit(fn, out_shardings=NamedSharding(mesh, P())).lower(*args).compile().as_text() or ""


def test_a_gather_and_a_sum():
    gathered = collectives_in(compiled_text(lambda x: x + 1.0, ((16, 4), ("fsdp",))))
    assert gathered == {"all-gather": Collectives(1, 4 * 16 * 4)}
    summed = collectives_in(compiled_text(lambda x: jnp.sum(x, 0), ((16, 4), ("fsdp",))))
    assert summed == {"all-reduce": Collectives(1, 4 * 4)}


def test_none_where_nothing_is_sent():
    assert collectives_in(compiled_text(lambda x: x * 2.0, ((16, 4), ()))) == {}


def test_what_is_started_counts_once_and_not_its_operand():
    text = """
      %s = (bf16[2,4]{1,0}, bf16[16,4]{1,0}, u32[]) all-gather-start(%x), channel_id=3, dimensions={0}
      %d = bf16[16,4]{1,0} all-gather-done(%s)
      %step = bf16[16,4]{1,0} all-gather(%y), channel_id=4, dimensions={0}
      %again = bf16[16,4]{1,0} all-gather(%y), channel_id=4, dimensions={0}
      %t = (f32[8]{0}, pred[2]{0}) all-reduce(%a, %b), to_apply=%add
    """
    assert collectives_in(text) == {"all-gather": Collectives(2, 2 * 2 * 16 * 4), "all-reduce": Collectives(1, 34)}
