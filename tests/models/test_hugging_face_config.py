"""Sizes from a ``config.json``."""

import pytest

from adalomo_jax.finetune.export import hugging_face_config
from adalomo_jax.models import PRESETS, from_hugging_face

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
    assert from_hugging_face(hugging_face_config(PRESETS[name], "float32")) == PRESETS[name]


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
        ({"model_type": "mistral"}, "model_type must be 'llama', got 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"mlp_bias": True}, "mlp_bias must be False, got True"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "got rope scaling of the type 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "got rope scaling of the type 'linear'"),
        ({"vocab_size": None, "hidden_size": None}, "the sizes vocab_size, hidden_size, head_dim are missing"),
        ({"num_attention_heads": 12}, "num_attention_heads must be a multiple of num_key_value_heads"),
    ],
)
def test_what_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError) as refused:
        from_hugging_face(CONFIG | change)
    assert message in str(refused.value) and "\n" not in str(refused.value)
