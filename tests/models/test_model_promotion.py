"""The CLI's own model promotes nothing implicitly: dtypes are ``strict``, and ranks ``raise``."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from small_models import FAMILIES
from tiers import slow

from adalomo_jax import adalomo, fuse
from adalomo_jax.models import PRESETS, Decoder, RopeScaling, generate, next_token_loss

BIASED = dataclasses.replace(
    PRESETS["tiny"],
    num_hidden_layers=2,
    max_position_embeddings=64,
    qkv_bias=True,
    o_bias=True,
    sliding_window=16,
    rope_scaling=RopeScaling(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
)
TIED = dataclasses.replace(PRESETS["tiny"], tie_word_embeddings=True)
CONFIGS = {"plain": PRESETS["tiny"], "tied": TIED, "biased": BIASED} | FAMILIES
TOKENS = jax.ShapeDtypeStruct((2, 32), jnp.int32)
SAMPLERS = [{"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9, "eos": 2}]


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def abstract(config, dtype, **options):
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, **options)))
    return graphdef, nnx.to_pure_dict(params)


@pytest.mark.parametrize(
    ("dtype", "config", "attention"),
    [
        *(slow("bfloat16", "biased", "tiles"), slow("bfloat16", "tied", "blocks"), slow("float32", "plain", "blocks")),
        *(("bfloat16", "gemma-2", "tiles"), slow("bfloat16", "gemma-3", "blocks"), slow("bfloat16", "olmo-2", "tiles")),
        *(
            slow("bfloat16", family, "blocks")
            for family in ("phi-4-mini", "smollm3", "granite", "qwen3", "qwen3-moe", "mixtral")
        ),
    ],
)
def test_a_training_step_traces(dtype, config, attention):
    graphdef, params = abstract(CONFIGS[config], jnp.dtype(dtype), attention=attention)

    def loss_fn(params, tokens, mask, segments):
        return next_token_loss(nnx.merge(graphdef, params), tokens, mask, segments)

    step = fuse(loss_fn, adalomo(1e-3), max_grad_norm=1.0, microbatches=2, reduction="sum")
    args = (TOKENS, jax.ShapeDtypeStruct((2, 32), bool), TOKENS)
    result = jax.eval_shape(step, params, step.abstract_state(params, *args), *args)
    assert jax.tree.leaves(result.params)[0].dtype == dtype


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["greedy", "drawn", "nucleus"])
@pytest.mark.parametrize("dtype", ["bfloat16", slow("float32")])
def test_generation_traces(dtype, sampler):
    graphdef, params = abstract(BIASED, jnp.dtype(dtype))
    sample = lambda params, tokens, key: generate(nnx.merge(graphdef, params), tokens, 4, key=key, **sampler)
    assert jax.eval_shape(sample, params, TOKENS, jax.random.key(0)).shape == (2, 36)
