"""Reading a sequence in parts, with a cache, equals the forward pass over the whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiers import always, slow

from adalomo_jax.models import PRESETS, Decoder, RopeScaling
from adalomo_jax.models.attention import BLOCK
from adalomo_jax.models.cache import cached_hidden, empty_cache

LLAMA = dataclasses.replace(
    PRESETS["tiny"], hidden_size=32, intermediate_size=48, num_hidden_layers=3, head_dim=8, max_position_embeddings=1200
)
FAMILIES = {
    "llama": LLAMA,
    "llama-3": dataclasses.replace(LLAMA, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8)),
    "linear": dataclasses.replace(LLAMA, rope_scaling=RopeScaling("linear", 4.0)),
    "mistral": dataclasses.replace(LLAMA, sliding_window=5),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, o_bias=True, tie_word_embeddings=True),
    "gemma": dataclasses.replace(
        *(LLAMA,),
        **dict(norms="around", norm_offset=1.0, embedding_scale=3.0, attention_scale=0.2, qk_norm="head"),
        **dict(sliding_window=5, windowed=(True, False), local_rope_theta=100.0, attention_softcap=2.0),
        **dict(logits_softcap=3.0, hidden_act="gelu_pytorch_tanh"),
    ),
    "olmo": dataclasses.replace(LLAMA, norms="after", qk_norm="all", rotated=(True, False), residual_scale=0.5),
    "phi": dataclasses.replace(LLAMA, fused_projections=True, partial_rotary_factor=0.5, logits_divisor=1.5),
}
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 256, (2, 24)))


def model_of(config):
    """Make a model with weights so large that every part of it affects the logits."""
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    draw = lambda w: jnp.asarray(random.normal(0.1, 0.3, w.shape).astype(np.float32))
    return nnx.merge(nnx.graphdef(abstract), jax.tree.map(draw, nnx.to_pure_dict(nnx.state(abstract, nnx.Param))))


cached_hidden_jitted = jax.jit(cached_hidden)


def in_parts(model, tokens, lengths):
    """Return the logits of all positions, read in parts of these lengths."""
    cache = empty_cache(model, tokens.shape[0], tokens.shape[1])
    found, start = [], 0
    for length in lengths:
        x, cache = cached_hidden_jitted(model, tokens[:, start : start + length], cache)
        found.append(model.logits(x))
        start += length
    assert start == tokens.shape[1] == int(cache.length)
    return jnp.concatenate(found, axis=1)


@pytest.mark.parametrize("family", always(FAMILIES, ["llama-3", "gemma"]))
def test_logits_are_those_of_the_whole_at_every_position(family):
    model = model_of(FAMILIES[family])
    whole = jax.jit(lambda model: model(TOKENS))(model)
    assert float(jnp.std(whole)) > 0.3
    for lengths in ([1] * 24, [8] + [1] * 16, [8, 16], [24]):
        np.testing.assert_allclose(in_parts(model, TOKENS, lengths), whole, atol=1e-4)


OPTIONS = [
    *(("llama-3", {"rope_scaling": None}), ("linear", {"rope_scaling": None}), ("mistral", {"sliding_window": None})),
    *(("gemma", {name: None}) for name in ("sliding_window", "local_rope_theta", "attention_scale")),
    *(("gemma", {name: None}) for name in ("attention_softcap", "logits_softcap")),
    *(("gemma", {"windowed": (True,)}), ("gemma", {"embedding_scale": 1.0}), ("gemma", {"norm_offset": 0.0})),
    *(("gemma", {"hidden_act": "silu"}), ("olmo", {"rotated": (True,)}), ("olmo", {"residual_scale": 1.0})),
    *(("phi", {"partial_rotary_factor": 1.0}), ("phi", {"logits_divisor": 1.0})),
]


@pytest.mark.parametrize(("family", "option"), [*OPTIONS[:3], *(slow(*pair) for pair in OPTIONS[3:])])
def test_each_of_the_family_s_parts_is_seen(family, option):
    """The test above would fail if the cache ignored it."""
    config = FAMILIES[family]
    changed = dataclasses.replace(config, **option)
    whole, other = (jax.jit(lambda model: model(TOKENS))(model_of(c)) for c in (config, changed))
    assert float(jnp.max(jnp.abs(whole - other))) > 1e-3


def test_norms_of_equal_shapes_are_not_exchanged():
    """A model whose norms have been swapped loads as well, and computes something else."""
    for family, one, other in (
        ("llama", "input_layernorm", "post_attention_layernorm"),
        ("gemma", "post_attention_layernorm", "pre_feedforward_layernorm"),
        ("olmo", "post_attention_layernorm", "post_feedforward_layernorm"),
    ):
        model, swapped = model_of(FAMILIES[family]), model_of(FAMILIES[family])
        setattr(swapped.layers, one, getattr(model.layers, other))
        setattr(swapped.layers, other, getattr(model.layers, one))
        assert float(jnp.max(jnp.abs(model(TOKENS) - swapped(TOKENS)))) > 1e-2


def test_a_prompt_of_several_blocks():
    model = model_of(FAMILIES["mistral"])
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 256, (1, BLOCK + 90)))
    whole = jax.jit(lambda model: model(tokens))(model)
    np.testing.assert_allclose(in_parts(model, tokens, [1, BLOCK + 88, 1]), whole, atol=1e-4)


def test_the_cache_has_the_type_of_the_weights():
    model = nnx.jit(lambda: Decoder(LLAMA, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))()
    x, cache = cached_hidden_jitted(model, TOKENS, empty_cache(model, 2, 30))
    assert x.dtype == cache.k_LBTKH.dtype == cache.v_LBTKH.dtype == jnp.bfloat16
    assert cache.k_LBTKH.shape == (3, 2, 30, 2, 8)
