"""Greedy sampling equals a plain loop, keys decide all other text, and nuclei are those of NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiers import slow

from adalomo_jax.models import PRESETS, Decoder, generate
from adalomo_jax.models.sampling import Sampler, nucleus, stream

CONFIG = dataclasses.replace(
    PRESETS["tiny"], hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=4, max_position_embeddings=24
)
PROMPT = jnp.array([[1, 2, 3], [9, 8, 7]])


@pytest.fixture(scope="module")
def model():
    abstract = nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
    params = jax.tree.map(lambda w: jnp.asarray(random.normal(0.1, 0.4, w.shape).astype(np.float32)), shapes)
    return nnx.merge(nnx.graphdef(abstract), params)


def test_greedy_equals_a_plain_loop(model):
    logits = jax.jit(lambda tokens: model(tokens))
    tokens = np.pad(PROMPT, [(0, 0), (0, 5)])
    for position in range(3, 8):
        tokens[:, position] = np.argmax(logits(tokens)[:, position - 1], axis=-1)
    greedy = jax.jit(lambda: generate(model, PROMPT, 5, key=jax.random.key(0), temperature=0))()
    assert np.array_equal(greedy, tokens)
    assert len(set(tokens[0, 3:])) > 1


def test_the_key_decides_and_the_prompt_stays(model):
    sampler = jax.jit(generate, static_argnames=("length", "temperature"))
    first, second, other = (
        np.asarray(sampler(model, PROMPT, length=12, key=jax.random.key(seed), temperature=2.0)) for seed in (0, 0, 1)
    )
    assert first.shape == (2, 15)
    assert np.array_equal(first[:, :3], PROMPT)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def plain_nucleus(logits, top_p):
    """Follow the definition, one row at a time."""
    found = np.full(logits.shape, -np.inf, np.float32)
    for i, row in enumerate(logits):
        probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        total = 0.0
        for token in np.argsort(-probabilities, kind="stable"):
            found[i, token] = row[token]
            total += probabilities[token]
            if total >= top_p:
                break
    return found


@pytest.mark.parametrize("top_p", [1e-6, 0.31, 0.91, 0.999])
def test_a_nucleus_is_the_smallest_set_of_that_probability(top_p):
    logits = np.random.default_rng(3).normal(0, 2, (5, 40)).astype(np.float32)
    logits[1] = 0.0  # ties: the nucleus takes only as many as it needs
    found = np.asarray(jax.jit(nucleus, static_argnums=1)(logits, top_p))
    expected = plain_nucleus(logits, top_p)
    assert np.array_equal(found, expected)
    assert 1 <= np.min(np.sum(np.isfinite(expected), axis=-1)) < 40


def test_sampled_tokens_are_in_the_nucleus_and_with_one_all_are(model):
    sampler = jax.jit(generate, static_argnames=("length", "temperature", "top_p"))
    logits_of = jax.jit(lambda model, tokens: model(tokens))
    draw = lambda seed, **options: np.asarray(
        sampler(model, PROMPT, length=8, key=jax.random.key(seed), temperature=2.0, **options)
    )
    for seed in range(3):
        assert np.array_equal(draw(seed), draw(seed, top_p=1.0))
        tokens = draw(seed, top_p=0.5)
        logits = np.asarray(logits_of(model, tokens)) / 2
        for position in range(3, 11):
            kept = plain_nucleus(logits[:, position - 1], 0.5 + 1e-4)
            assert np.all(np.isfinite(kept[np.arange(2), tokens[:, position]]))
    greedy = sampler(model, PROMPT, length=8, key=jax.random.key(0), temperature=0)
    assert np.array_equal(draw(0, top_p=1e-6), greedy)  # a nucleus of one token
    assert not np.array_equal(draw(0), draw(0, top_p=0.5))


def test_after_the_end_token_there_is_nothing_else(model):
    sampler = jax.jit(generate, static_argnames=("length", "temperature", "eos"))
    draw = lambda **options: np.asarray(
        sampler(model, PROMPT, length=12, key=jax.random.key(0), temperature=2.0, **options)
    )
    free = draw()
    eos = int(free[0, 6])
    ended = draw(eos=eos)
    for row, plain in zip(ended, free):
        end = 3 + next((i for i, token in enumerate(plain[3:]) if token == eos), 12)
        assert np.array_equal(row[: end + 1], plain[: end + 1])
        assert np.all(row[end:] == eos)
    assert not np.array_equal(ended, free)


@pytest.mark.slow
def test_each_of_several_tokens_ends_a_sequence(model):
    free = np.asarray(generate(model, PROMPT, 12, key=jax.random.key(0), temperature=2.0))
    eos = (int(free[0, 6]), int(free[1, 5]))
    ended = np.asarray(generate(model, PROMPT, 12, key=jax.random.key(0), temperature=2.0, eos=eos))
    for row, plain in zip(ended, free):
        end = 3 + next(i for i, token in enumerate(plain[3:]) if token in eos)
        assert np.array_equal(row[: end + 1], plain[: end + 1])
        assert np.all(row[end:] == plain[end])
    sampler = Sampler(2.0, eos=eos)
    assert len(list(stream(model, PROMPT, 12, key=jax.random.key(0), sampler=sampler))) < 12


@pytest.mark.parametrize("sampler", [Sampler(0.0), slow(Sampler(2.0)), Sampler(2.0, 0.7)])
def test_a_stream_is_the_same_text(model, sampler):
    whole = generate(model, PROMPT, 6, key=jax.random.key(1), temperature=sampler.temperature, top_p=sampler.top_p)
    streamed = list(stream(model, PROMPT, 6, key=jax.random.key(1), sampler=sampler))
    assert np.array_equal(np.stack(streamed, axis=1), whole[:, 3:])


def test_a_stream_stops_when_all_have_ended(model):
    free = generate(model, PROMPT[:1], 12, key=jax.random.key(0), temperature=2.0)
    sampler = Sampler(2.0, eos=int(free[0, 6]))
    streamed = list(stream(model, PROMPT[:1], 12, key=jax.random.key(0), sampler=sampler))
    first = free[0, 3:].tolist().index(int(free[0, 6]))
    assert [int(token[0]) for token in streamed] == free[0, 3 : 4 + first].tolist()


def test_nothing_to_add(model):
    assert np.array_equal(generate(model, PROMPT, 0, key=jax.random.key(0)), PROMPT)
    assert list(stream(model, PROMPT, 0, key=jax.random.key(0), sampler=Sampler())) == []


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (22, {}, "fit 24 positions, got 3"),
        (4, {"temperature": -1.0}, "temperature .*got -1.0"),
        (4, {"temperature": float("nan")}, "temperature .*got nan"),
        (4, {"top_p": 0.0}, "top_p .*got 0.0"),
        (4, {"top_p": 1.1}, "top_p .*got 1.1"),
    ],
)
def test_impossible_arguments_are_refused(model, length, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPT, length, key=jax.random.key(0), **options)
    with pytest.raises(ValueError, match=message):
        next(stream(model, PROMPT, length, key=jax.random.key(0), sampler=Sampler(**options)))
