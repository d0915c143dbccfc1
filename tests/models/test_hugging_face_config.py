"""Sizes are read from a ``config.json``."""

import dataclasses
import math

import jax
import pytest
from tiers import always

from adalomo_jax.models import PRESETS, RopeScaling, from_hugging_face, to_hugging_face
from adalomo_jax.pretrained.names import param_shapes

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def test_a_published_config_is_the_preset():
    assert from_hugging_face(CONFIG) == PRESETS["llama-3-8b"]


@pytest.mark.parametrize("name", PRESETS)
def test_what_finetune_exports_is_read_back(name):
    assert from_hugging_face(to_hugging_face(PRESETS[name], "float32")) == PRESETS[name]


PUBLISHED = {
    **{"smollm2-135m": 0.1345, "smollm3-3b": 3.0751, "llama-2-7b": 6.7384, "llama-2-13b": 13.0159},
    **{"llama-3.1-8b": 8.0303, "llama-3.1-70b": 70.5537, "llama-3.2-1b": 1.2358, "llama-3.2-3b": 3.2127},
    **{"mistral-7b": 7.2480, "qwen3-0.6b": 0.5960, "qwen3-1.7b": 1.7206, "qwen3-4b": 4.0225, "qwen3-8b": 8.1907},
    **{"qwen3-14b": 14.7683, "qwen3-32b": 32.7621, "gemma-2-2b": 2.6143, "gemma-2-9b": 9.2417, "gemma-3-1b": 0.9999},
    **{"gemma-3-4b": 3.8803, "gemma-3-12b": 11.7660, "gemma-3-27b": 27.0093, "phi-4-mini": 3.8360, "phi-4": 14.6595},
    **{"olmo-2-7b": 7.2986, "granite-3-8b": 8.1708, "qwen3-30b-a3b": 30.5321, "mixtral-8x7b": 46.7028},
}
"""Billions of weights, as the hub counts them; of Gemma 3 those of the text part."""


@pytest.mark.parametrize("name", always(PUBLISHED, {"qwen3-4b", "gemma-3-4b", "phi-4", "granite-3-8b"}))
def test_a_preset_has_as_many_weights_as_the_published_model(name):
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(param_shapes(PRESETS[name])))
    assert round(weights / 1e9, 4) == PUBLISHED[name]


LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_the_families():
    llama = from_hugging_face(CONFIG | {"rope_scaling": LLAMA_3_1, "attention_bias": True})
    assert llama.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert (llama.qkv_bias, llama.o_bias, llama.sliding_window) == (True, True, None)
    mistral = from_hugging_face(CONFIG | {"model_type": "mistral", "sliding_window": 4096})
    assert (mistral.qkv_bias, mistral.o_bias, mistral.sliding_window) == (False, False, 4096)
    assert from_hugging_face(CONFIG | {"model_type": "mistral", "sliding_window": None}).sliding_window is None
    qwen2 = from_hugging_face(CONFIG | {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False})
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.sliding_window) == (True, False, None)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"rope_scaling": LLAMA_3_1, "attention_bias": True}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("mistral", {"sliding_window": 128}),
        ("qwen2", {}),
    ],
)
def test_each_family_is_read_back(family, change):
    config = from_hugging_face(CONFIG | {"model_type": family} | change)
    written = to_hugging_face(config, "float32")
    assert written["model_type"] == family and from_hugging_face(written) == config


def test_an_entry_of_another_family_means_nothing():
    """transformers' Llama turns whole heads, whatever the entry says; Phi-3 reads it from both places."""
    share = {"partial_rotary_factor": 0.5}
    assert from_hugging_face(CONFIG | share) == from_hugging_face(CONFIG)
    assert from_hugging_face(CONFIG | {"attention_multiplier": 0.5}) == from_hugging_face(CONFIG)
    phi3 = CONFIG | {"model_type": "phi3"}
    assert from_hugging_face(phi3 | share).rotary_dim == 64
    assert from_hugging_face(phi3 | {"rope_parameters": {"rope_type": "default"} | share}).rotary_dim == 64
    assert from_hugging_face(phi3).rotary_dim == 128


def test_a_mix_of_families_cannot_be_written():
    config = from_hugging_face(CONFIG | {"model_type": "mistral", "sliding_window": 128})
    with pytest.raises(
        ValueError, match="no family of llama, .* has models with sliding_window=128, norms=.after. tog"
    ):
        to_hugging_face(dataclasses.replace(config, norms="after"), "float32")


def test_what_may_be_missing_follows_from_the_rest():
    config = {name: value for name, value in CONFIG.items() if name not in ("num_key_value_heads", "rope_theta")}
    found = from_hugging_face(config | {"head_dim": None})
    assert (found.num_key_value_heads, found.head_dim, found.rope_theta) == (32, 128, 10000.0)
    assert from_hugging_face(CONFIG | {"head_dim": 64}).head_dim == 64


def test_the_newer_place_of_the_rotary_base():
    config = {name: value for name, value in CONFIG.items() if name not in ("rope_theta", "rope_scaling")}
    found = from_hugging_face(config | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}})
    assert found == PRESETS["llama-3-8b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type must be one of llama, mistral, mixtral, qwen2, qwen3, qwen3_moe"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu' or 'gelu_pytorch_tanh', got 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0.0, got 0.1"),
        ({"clip_qkv": 8.0}, "clip_qkv is not known, got 8.0: it may change what the model computes"),
        ({"layer_types": ["chunked_attention"]}, "layer_types[0] must be 'full_attention' or 'sliding_attention'"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types must be of the 32 layers of num_hidden_layers, got 1 of them",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "takes low_freq_factor, high_freq_factor, original"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "got rope scaling of the type 'yarn'"),
        ({"vocab_size": None, "hidden_size": None}, "the sizes vocab_size, hidden_size, head_dim are missing"),
        (
            {"num_attention_heads": 8192},
            "num_attention_heads must be at most the 4096 of hidden_size without a head_dim",
        ),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling.rope_type is missing, which says what its factor means"),
        ({"num_attention_heads": 12}, "num_attention_heads must be a multiple of num_key_value_heads"),
    ],
)
def test_what_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError) as refused:
        from_hugging_face(CONFIG | change)
    assert message in str(refused.value) and "\n" not in str(refused.value)
