"""Sampled text: greedy equals a plain loop, and keys decide the rest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adalomo_jax.models import PRESETS, Llama, generate

CONFIG = dataclasses.replace(
    PRESETS["tiny"], hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=4, max_position_embeddings=24
)
PROMPT = jnp.array([[1, 2, 3], [9, 8, 7]])


@pytest.fixture(scope="module")
def model():
    abstract = nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)))
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


@pytest.mark.parametrize(
    ("length", "temperature", "message"), [(22, 1.0, "fit 24 positions, got 3"), (4, -1.0, "temperature .*got -1.0")]
)
def test_impossible_arguments_are_refused(model, length, temperature, message):
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPT, length, key=jax.random.key(0), temperature=temperature)
