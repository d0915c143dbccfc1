"""The chunked loss has the value and gradient of the direct one, and takes less memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adalomo_jax.models import PRESETS, Decoder, count_targets, next_token_loss

T = 23
CONFIG = dataclasses.replace(
    PRESETS["tiny"], vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=4
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, T)))
MASK = jnp.asarray(np.random.default_rng(1).integers(0, 2, (3, T)))


@functools.cache
def make(config=CONFIG):
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(2)
    shapes = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
    return nnx.graphdef(abstract), jax.tree.map(
        lambda w: jnp.asarray(random.normal(0.1, 0.16, w.shape).astype(np.float32)), shapes
    )


def direct_loss(model, tokens, mask=None):
    """Plain differentiation applies to this loss, without the model's own head and its backward pass."""
    tied = model.config.tie_word_embeddings
    head = model.embed_tokens.embedding[...].T if tied else model.lm_head.kernel[...]
    log_p = jax.nn.log_softmax(model.hidden(tokens)[:, :-1] @ head)
    losses = -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    weights = jnp.ones_like(losses) if mask is None else mask[:, 1:].astype(jnp.float32)
    return jnp.sum(losses * weights) / jnp.sum(weights)


def value_and_gradient(loss, config, *args, **options):
    graphdef, params = make(config)
    return jax.jit(jax.value_and_grad(lambda p: loss(nnx.merge(graphdef, p), *args, **options)))(params)


@pytest.mark.parametrize(
    ("chunk_size", "mask", "tied"),
    [
        pytest.param(7, None, False, id="padded", marks=pytest.mark.slow),
        pytest.param(7, MASK, False, id="padded, masked", marks=pytest.mark.slow),
        pytest.param(1, MASK.astype(bool), True, id="single positions, masked, tied"),
        pytest.param(256, None, True, id="one chunk, tied", marks=pytest.mark.slow),
    ],
)
def test_equals_the_direct_loss(chunk_size, mask, tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    loss, gradient = value_and_gradient(next_token_loss, config, TOKENS, mask, chunk_size=chunk_size)
    expected, expected_gradient = value_and_gradient(direct_loss, config, TOKENS, mask)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_differs_where_one_target_differs():
    loss, _ = value_and_gradient(next_token_loss, CONFIG, TOKENS, MASK, chunk_size=7)
    kept = np.argwhere(np.asarray(MASK)[:, 1:])[-1] + [0, 1]
    without_one, _ = value_and_gradient(direct_loss, CONFIG, TOKENS, MASK.at[tuple(kept)].set(0))
    assert abs(float(loss) - float(without_one)) > 1e-4


def test_no_target_is_no_loss():
    loss, gradient = value_and_gradient(next_token_loss, CONFIG, TOKENS, jnp.zeros_like(MASK))
    assert loss == 0
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


@pytest.mark.uncached
def test_logits_of_the_whole_sequence_never_exist():
    length, vocab_size = 256, 32768
    config = dataclasses.replace(CONFIG, vocab_size=vocab_size)
    graphdef, params = make(config)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def temporaries(loss):
        gradient = jax.grad(lambda p, t: loss(nnx.merge(graphdef, p), t))
        sizes = jax.jit(gradient).lower(params, tokens).compile().memory_analysis()
        assert sizes is not None
        return sizes.temp_size_in_bytes

    logits = length * vocab_size * 4
    assert temporaries(lambda model, t: next_token_loss(model, t, chunk_size=8)) < 0.4 * logits
    assert temporaries(direct_loss) >= logits


@pytest.mark.uncached
@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_is_the_head_is_not_transposed(tied):
    """The products of the backward pass would write out a transposed copy. An untied head has these axes."""
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    graphdef, params = make(config)
    gradient = jax.jit(jax.grad(lambda params: next_token_loss(nnx.merge(graphdef, params), TOKENS, chunk_size=8)))
    compiled = gradient.lower(params).compile().as_text() or ""
    assert (f"f32[{config.hidden_size},{config.vocab_size}]" in compiled) != tied


@pytest.mark.slow
def test_bfloat16_loss_is_float32():
    loss = jax.jit(lambda: next_token_loss(Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16), TOKENS))()
    assert loss.dtype == jnp.float32
    assert abs(float(loss) - np.log(CONFIG.vocab_size)) < 0.1


@pytest.mark.parametrize(
    ("length", "chunk_size", "message"), [(1, 4, "at least 2 tokens .*got 1"), (8, 0, "chunk_size .*got 0")]
)
def test_impossible_arguments_are_refused(length, chunk_size, message):
    graphdef, params = make()
    with pytest.raises(ValueError, match=message):
        next_token_loss(nnx.merge(graphdef, params), jnp.zeros((1, length), jnp.int32), chunk_size=chunk_size)


BOUNDS = (0, 5, 6, T)
SEGMENTS = jnp.broadcast_to(jnp.repeat(jnp.arange(1, 4), jnp.diff(jnp.array(BOUNDS)), total_repeat_length=T), (3, T))


def loss_of_documents_apart(model, tokens, mask):
    """Sum over the documents, each in a batch of its own, and divide by their number of targets."""
    total, count = 0.0, 0.0
    for a, b in zip(BOUNDS, BOUNDS[1:]):
        if b - a > 1:
            of_document = jnp.sum(mask[:, a + 1 : b].astype(jnp.float32))
            total += direct_loss(model, tokens[:, a:b], mask[:, a:b]) * of_document
            count += of_document
    return total / count


def test_documents_packed_into_a_sequence_have_the_loss_and_gradient_of_documents_apart():
    found = value_and_gradient(next_token_loss, CONFIG, TOKENS, MASK, SEGMENTS, chunk_size=7)
    expected = value_and_gradient(loss_of_documents_apart, CONFIG, TOKENS, MASK)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6), found, expected)
    without, _ = value_and_gradient(next_token_loss, CONFIG, TOKENS, MASK)
    assert abs(without - expected[0]) > 1e-3


def test_the_losses_of_parts_add_up_to_the_mean_of_the_batch():
    count = count_targets(MASK, SEGMENTS)
    graphdef, params = make()
    model = nnx.merge(graphdef, params)
    rows = [slice(i, i + 1) for i in range(3)]
    loss = jax.jit(next_token_loss)
    parts = [loss(model, TOKENS[row], MASK[row], SEGMENTS[row], count=count) for row in rows]
    np.testing.assert_allclose(sum(parts), loss(model, TOKENS, MASK, SEGMENTS), rtol=1e-5)
    assert count_targets(jnp.zeros((1, 4), bool)) == 1
