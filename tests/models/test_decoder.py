"""Llama equals its equations in plain NumPy, and keeps what the fused step relies on."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiers import slow

from adalomo_jax.models import PRESETS, Decoder, DecoderConfig, decoder_of, next_token_loss

SMALL = DecoderConfig(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
)
TIED = dataclasses.replace(SMALL, tie_word_embeddings=True)
WEIGHT_COUNTS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-65b": 65_285_660_672,
    "llama-3-8b": 8_030_261_248,
    "smollm2-135m": 134_515_008,
}


@functools.cache
def make(config=SMALL, *, remat=True):
    """Make a model with weights so large and norms so uneven that every part matters."""

    def model():
        return Decoder(config, rngs=nnx.Rngs(0), remat=remat)

    random = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(model), nnx.Param))
    return nnx.graphdef(nnx.eval_shape(model)), jax.tree.map_with_path(
        lambda path, w: jnp.asarray(random.normal(float(path[-1].key == "weight"), 0.16, w.shape).astype(np.float32)),
        shapes,
    )


@functools.cache
def logits_of_small():
    graphdef, params = make()
    return np.asarray(jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))(params, make_tokens()))


def make_tokens(batch=2, length=17, config=SMALL):
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, length))


def numpy_llama(params, tokens, config):
    """Compute the Llama equations for one sequence, one head and one pair of coordinates at a time."""
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    head = w["embed_tokens"]["embedding"].T if config.tie_word_embeddings else w["lm_head"]["kernel"]

    def norm(x, weight):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) * weight

    def turned(x):
        out, half = np.zeros_like(x), config.head_dim // 2
        for t in range(len(x)):
            for i in range(half):
                z = complex(x[t, i], x[t, i + half])
                z *= np.exp(1j * t * config.rope_theta ** (-2 * i / config.head_dim))
                out[t, i], out[t, i + half] = z.real, z.imag
        return out

    def attention(x, p):
        out, H = [], config.head_dim
        for n in range(config.num_attention_heads):
            k = n // (config.num_attention_heads // config.num_key_value_heads)
            query = turned(x @ p["q_proj"]["kernel"][:, n * H : (n + 1) * H])
            key = turned(x @ p["k_proj"]["kernel"][:, k * H : (k + 1) * H])
            scores = query @ key.T / np.sqrt(H)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            probabilities = np.exp(scores - scores.max(axis=-1, keepdims=True))
            probabilities /= probabilities.sum(axis=-1, keepdims=True)
            out.append(probabilities @ (x @ p["v_proj"]["kernel"][:, k * H : (k + 1) * H]))
        return np.concatenate(out, axis=-1) @ p["o_proj"]["kernel"]

    def mlp(x, p):
        gate = x @ p["gate_proj"]["kernel"]
        return (gate / (1 + np.exp(-gate)) * (x @ p["up_proj"]["kernel"])) @ p["down_proj"]["kernel"]

    def sequence(tokens):
        x = w["embed_tokens"]["embedding"][tokens]
        for i in range(config.num_hidden_layers):
            p = jax.tree.map(lambda a, i=i: a[i], w["layers"])
            x = x + attention(norm(x, p["input_layernorm"]["weight"]), p["self_attn"])
            x = x + mlp(norm(x, p["post_attention_layernorm"]["weight"]), p["mlp"])
        return norm(x, w["norm"]["weight"]) @ head

    return np.stack([sequence(row) for row in tokens])


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["untied", "tied"])
def test_logits_equal_the_equations(config):
    graphdef, params = make(config)
    logits = jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))(params, make_tokens())
    np.testing.assert_allclose(logits, numpy_llama(params, make_tokens(), config), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 9000.0},
        {"rms_norm_eps": 1e-2},
        {"num_hidden_layers": 2},
        {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16},
    ],
    ids=lambda change: next(iter(change)),
)
def test_logits_differ_from_other_equations(change):
    other = numpy_llama(make()[1], make_tokens(), dataclasses.replace(SMALL, **change))
    assert np.abs(logits_of_small() - other).max() > 1e-2


@pytest.mark.parametrize("name", WEIGHT_COUNTS)
def test_presets_have_the_published_sizes(name):
    params = nnx.state(nnx.eval_shape(lambda: Decoder(PRESETS[name], rngs=nnx.Rngs(0))), nnx.Param)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == WEIGHT_COUNTS[name]


@pytest.mark.slow
def test_weights_are_a_function_of_the_seed():
    weights = jax.jit(lambda key: jax.tree.leaves(nnx.state(Decoder(SMALL, rngs=nnx.Rngs(key)))))
    first, second, other = (weights(jax.random.key(seed)) for seed in (3, 3, 4))
    assert all(jnp.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(jnp.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_layers_start_different():
    stack = jax.jit(lambda: Decoder(SMALL, rngs=nnx.Rngs(0)).layers.mlp.up_proj.kernel[...])()
    assert abs(float(jnp.std(stack)) - 0.02) < 0.002
    assert not jnp.array_equal(stack[0], stack[1])


def test_stacked_leaves_go_straight_into_one_scan():
    graphdef, params = make(TIED)
    flat, treedef = jax.tree.flatten(params)
    jaxpr = jax.make_jaxpr(lambda *flat: nnx.merge(graphdef, treedef.unflatten(flat)).hidden(make_tokens()))(*flat)
    stacked = [path[0].key == "layers" for path, _ in jax.tree.leaves_with_path(params)]
    scans = [equation for equation in jaxpr.jaxpr.eqns if equation.primitive.name == "scan"]
    assert len(scans) == 1
    taken = {id(variable) for variable in scans[0].invars}
    assert [id(variable) in taken for variable in jaxpr.jaxpr.invars] == stacked


def test_a_later_token_changes_no_earlier_logits():
    graphdef, params = make()
    logits = jax.jit(lambda t: nnx.merge(graphdef, params)(t))
    tokens = make_tokens()
    changed = tokens.copy()
    changed[:, 9] = (changed[:, 9] + 1) % SMALL.vocab_size
    difference = np.abs(logits(tokens) - logits(changed)).max(axis=-1)[0]
    assert difference[:9].max() == 0
    assert difference[9:].min() > 0


@pytest.mark.parametrize("remat", [slow(False), jax.checkpoint_policies.dots_saveable], ids=["none", "policy"])
def test_remat_changes_no_gradient(remat):
    def gradients(remat):
        graphdef, params = make(remat=remat)
        return jax.jit(jax.grad(lambda p: next_token_loss(nnx.merge(graphdef, p), jnp.asarray(make_tokens()))))(params)

    for a, b in zip(jax.tree.leaves(gradients(True)), jax.tree.leaves(gradients(remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.uncached
def test_remat_saves_memory():
    def temporaries(remat):
        config = dataclasses.replace(SMALL, max_position_embeddings=256, num_hidden_layers=8)
        graphdef, params = make(config, remat=remat)
        tokens = jax.ShapeDtypeStruct((1, 256), jnp.int32)
        loss = jax.grad(lambda p, t: next_token_loss(nnx.merge(graphdef, p), t))
        sizes = jax.jit(loss).lower(params, tokens).compile().memory_analysis()
        assert sizes is not None
        return sizes.temp_size_in_bytes

    assert temporaries(True) < 0.5 * temporaries(False)


def test_bfloat16_weights_and_float32_logits():
    model = nnx.eval_shape(lambda: Decoder(SMALL, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("bfloat16")}
    graphdef, params = nnx.split(model)
    hidden = jax.eval_shape(lambda p: nnx.merge(graphdef, p).hidden(jnp.asarray(make_tokens())), params)
    logits = jax.eval_shape(lambda p: nnx.merge(graphdef, p)(jnp.asarray(make_tokens())), params)
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_key_value_heads": 4}, "multiple of num_key_value_heads"), ({"head_dim": 7}, "head_dim must be even")],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_a_sequence_beyond_the_positions_is_refused():
    graphdef, params = make()
    with pytest.raises(ValueError, match="max_position_embeddings=32 tokens, got 33"):
        nnx.merge(graphdef, params)(jnp.zeros((1, 33), jnp.int32))


@pytest.mark.parametrize("dtype", [slow(jnp.float32), jnp.bfloat16])
def test_a_model_of_given_parameters_computes_in_their_type(dtype):
    config = dataclasses.replace(PRESETS["tiny"], hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=4)
    model = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))()
    found = decoder_of(config, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    tokens = jnp.arange(8)[None]
    assert found.hidden(tokens).dtype == dtype
    np.testing.assert_array_equal(found(tokens), model(tokens))


def test_the_names_from_before_there_were_families_are_the_same():
    from adalomo_jax import models

    old = models.Llama, models.LlamaConfig, models.llama_of
    assert old == (models.Decoder, models.DecoderConfig, models.decoder_of)
