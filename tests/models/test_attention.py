"""Attention in blocks, in tiles and by the TPU's kernel equals plain attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import slow

from adalomo_jax.models import batch_sharding, make_mesh
from adalomo_jax.models.attention import BLOCK, causal_attention, kind_for, splash_takes


def make_inputs(length, *, heads=4, kv_heads=2, width=8, batch=2):
    random = np.random.default_rng(0)
    shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def values_and_gradients(attention, inputs):
    *qkv, weights = inputs

    def loss(q, k, v):
        out = attention(q, k, v)
        return jnp.sum(out * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)
    return out, gradients


plain = partial(jax.nn.dot_product_attention, is_causal=True)


LENGTHS = {"blocks": (1, 2 * BLOCK - 7), "tiles": (1, 64, 8 * 100 + 51)}
FURTHER_LENGTHS = {"blocks": (BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK - 7), "tiles": (63, 65, 8 * 64, 8 * 64 + 1)}


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        *((kind, length) for kind in LENGTHS for length in LENGTHS[kind]),
        *(slow(kind, length) for kind in LENGTHS for length in FURTHER_LENGTHS[kind]),
    ],
)
def test_equals_plain_attention(kind, length):
    inputs = make_inputs(length)
    attention = partial(causal_attention, kind=kind)
    actual, expected = values_and_gradients(attention, inputs), values_and_gradients(plain, inputs)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5), actual, expected)


@pytest.mark.parametrize("kind", LENGTHS)
def test_the_comparison_sees_a_key_of_the_future(kind):
    q, k, v, _ = make_inputs(BLOCK + 1)
    attention = jax.jit(causal_attention, static_argnames="kind")
    actual, expected = attention(q, k, v, kind=kind), jax.nn.dot_product_attention(q, k, v)
    assert np.max(np.abs(actual - expected)) > 1e-2


def test_the_kernel_for_tpus_equals_plain_attention():
    inputs = make_inputs(256, width=128, batch=1)
    splash = partial(causal_attention, kind="splash", interpret=True)
    actual, expected = values_and_gradients(splash, inputs), values_and_gradients(plain, inputs)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-4, atol=2e-4), actual, expected)


def apart(q, k, v, bounds):
    """Apply plain attention to each document alone."""
    parts = [slice(a, b) for a, b in zip(bounds, bounds[1:])]
    return jnp.concatenate([plain(q[:, part], k[:, part], v[:, part]) for part in parts], axis=1)


BOUNDS = {256: (0, 10, 128, 256), BLOCK + 100: (0, 70, BLOCK - 1, BLOCK + 40, BLOCK + 100)}


def packed(length):
    bounds = BOUNDS[length]
    segments_T = jnp.repeat(jnp.arange(1, len(bounds)), jnp.diff(jnp.array(bounds)), total_repeat_length=length)
    return bounds, jnp.broadcast_to(segments_T, (2, length))


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("length", [256, slow(BLOCK + 100)])
def test_documents_in_one_sequence_do_not_see_each_other(length, kind):
    bounds, segments_BT = packed(length)
    inputs = make_inputs(length)
    actual = values_and_gradients(partial(causal_attention, kind=kind, segments_BT=segments_BT), inputs)
    expected = values_and_gradients(partial(apart, bounds=bounds), inputs)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5), actual, expected)


def windowed(q, k, v, window):
    distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
    return jax.nn.dot_product_attention(q, k, v, mask=((distance >= 0) & (distance < window))[None, None])


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("window", [slow(1), slow(5), BLOCK, slow(BLOCK + 50)])
def test_a_window_hides_what_lies_further_back(window, kind):
    inputs = make_inputs(BLOCK + 100)
    actual = values_and_gradients(partial(causal_attention, kind=kind, window=window), inputs)
    expected = values_and_gradients(partial(windowed, window=window), inputs)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5), actual, expected)


@pytest.mark.slow
def test_the_kernel_for_tpus_has_documents_and_windows():
    inputs = make_inputs(256, width=128)
    bounds, segments_BT = packed(256)
    splash = partial(causal_attention, kind="splash", interpret=True)
    for actual, expected in (
        (partial(splash, segments_BT=segments_BT), partial(apart, bounds=bounds)),
        (partial(splash, window=40), partial(windowed, window=40)),
    ):
        found = values_and_gradients(actual, inputs), values_and_gradients(expected, inputs)
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-4, atol=2e-4), *found)


def test_what_the_kernel_for_tpus_does_not_take_is_refused():
    assert splash_takes(2048, 128) and not splash_takes(2048, 64) and not splash_takes(100, 128)
    with pytest.raises(ValueError, match="got 100 positions and heads 8 wide. Take attention='blocks'"):
        q, k, v, _ = make_inputs(100)
        causal_attention(q, k, v, "splash")


@pytest.mark.parametrize("kind", LENGTHS)
def test_in_bfloat16_no_further_from_the_truth_than_plain_attention(kind):
    """A sum or an exponential in bfloat16 would be twice as far."""
    inputs = make_inputs(200, width=16)
    narrow = [x.astype(jnp.bfloat16) for x in inputs]
    truth = values_and_gradients(plain, [x.astype(jnp.float32) for x in narrow])
    found = values_and_gradients(partial(causal_attention, kind=kind), narrow)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    distance = lambda x, t: float(jnp.linalg.norm(x.astype(jnp.float32) - t))
    errors = jax.tree.map(distance, found, truth)
    of_plain = jax.tree.map(distance, values_and_gradients(plain, narrow), truth)
    for error, most in zip(jax.tree.leaves(errors), jax.tree.leaves(of_plain), strict=True):
        assert error < 1.5 * most


@pytest.mark.parametrize("kv_heads", [3, slow(4)])
def test_tiles_on_a_mesh_that_need_not_divide_the_heads(kv_heads):
    sharding = batch_sharding(make_mesh({"fsdp": 2, "tensor": 4}))
    inputs = make_inputs(100, heads=2 * kv_heads, kv_heads=kv_heads)
    actual = values_and_gradients(partial(causal_attention, kind="tiles", sharding=sharding), inputs)
    expected = values_and_gradients(plain, inputs)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5), actual, expected)


def test_what_suits_a_cpu():
    """Beyond some length, tiles would hold more than blocks."""
    assert kind_for("cpu", 512, 64, jnp.float32) == kind_for("cpu", 2048, 64, jnp.float32) == "tiles"
    assert kind_for("cpu", 2049, 64, jnp.float32) == "blocks"


@pytest.mark.uncached
@pytest.mark.parametrize("kind", LENGTHS)
def test_only_the_scores_of_one_block_are_held(kind):
    """A gradient that held the scores of all queries would need temporaries of their size."""
    length, heads = 8 * BLOCK, 2
    inputs = make_inputs(length, heads=heads, kv_heads=1, batch=1)[:3]
    temporaries = []
    for attention in (partial(causal_attention, kind=kind), plain):
        compiled = (
            jax.jit(jax.grad(lambda *qkv, f=attention: jnp.sum(f(*qkv)), argnums=(0, 1, 2))).lower(*inputs).compile()
        )
        sizes = compiled.memory_analysis()
        assert sizes is not None
        temporaries.append(sizes.temp_size_in_bytes)
    scores = 4 * heads * length * length
    assert temporaries[0] < scores < temporaries[1]
