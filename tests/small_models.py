"""Small models of each family, with random weights, and their files."""

import dataclasses
import re

import jax
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from adalomo_jax.models import DecoderConfig, RopeScaling
from adalomo_jax.pretrained.names import param_shapes, tensors_of

LLAMA = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
)
LLAMA_3 = dataclasses.replace(LLAMA, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
MISTRAL = dataclasses.replace(LLAMA, sliding_window=9)
QWEN2 = dataclasses.replace(LLAMA, qkv_bias=True, tie_word_embeddings=True)
QWEN3 = dataclasses.replace(LLAMA, qk_norm="head", rope_theta=1e6)
GEMMA_2 = dataclasses.replace(
    LLAMA,
    norms="around",
    norm_offset=1.0,
    embedding_scale=8.0,
    attention_scale=24**-0.5,
    attention_softcap=3.0,
    logits_softcap=2.0,
    hidden_act="gelu_pytorch_tanh",
    sliding_window=9,
    windowed=(True, False),
    tie_word_embeddings=True,
    num_hidden_layers=4,
)
GEMMA_3 = dataclasses.replace(
    GEMMA_2,
    attention_softcap=None,
    logits_softcap=None,
    qk_norm="head",
    rope_theta=1e6,
    rope_scaling=RopeScaling("linear", 8.0),
    local_rope_theta=1e4,
    windowed=(True, True, False),
    num_hidden_layers=6,
)
PHI_3 = dataclasses.replace(LLAMA, fused_projections=True, sliding_window=20)
PHI_4_MINI = dataclasses.replace(
    PHI_3,
    sliding_window=None,
    tie_word_embeddings=True,
    partial_rotary_factor=0.75,
    rope_scaling=RopeScaling(
        "longrope",
        original_max_position_embeddings=128,
        short_factor=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5),
        long_factor=(1.0, 1.5, 2.0, 3.0, 5.0, 8.0),
        attention_factor=1.25,
    ),
)
SMOLLM3 = dataclasses.replace(LLAMA, rotated=(True, True, False), rope_theta=2e6, tie_word_embeddings=True)
GRANITE = dataclasses.replace(
    LLAMA, embedding_scale=12.0, attention_scale=0.1, residual_scale=0.22, logits_divisor=4.0, tie_word_embeddings=True
)
OLMO_2 = dataclasses.replace(LLAMA, norms="after", qk_norm="all", rope_theta=5e5)
MIXTRAL = dataclasses.replace(LLAMA, num_experts=5, num_experts_per_tok=2, rope_theta=1e6)
QWEN3_MOE = dataclasses.replace(
    QWEN3, intermediate_size=48, num_experts=8, num_experts_per_tok=3, router_aux_loss_coef=0.02
)
FAMILIES = {
    "llama": LLAMA,
    "llama-3": LLAMA_3,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma-2": GEMMA_2,
    "gemma-3": GEMMA_3,
    "phi-3": PHI_3,
    "phi-4-mini": PHI_4_MINI,
    "smollm3": SMOLLM3,
    "granite": GRANITE,
    "olmo-2": OLMO_2,
    "mixtral": MIXTRAL,
    "qwen3-moe": QWEN3_MOE,
}
BIASES = dict(qkv_bias=True, o_bias=True)
LINEAR = RopeScaling("linear", 4.0)
VARIANTS = {
    "llama, biases": dataclasses.replace(LLAMA, **BIASES, mlp_bias=True, tie_word_embeddings=True),
    "llama, linear": dataclasses.replace(LLAMA, rope_scaling=LINEAR, rms_norm_eps=1e-3, rope_theta=1e3),
    "mistral, no window": dataclasses.replace(MISTRAL, sliding_window=None, head_dim=24),
    "mistral, heads": dataclasses.replace(MISTRAL, num_key_value_heads=4, sliding_window=3, tie_word_embeddings=True),
    "qwen2, windows": dataclasses.replace(QWEN2, sliding_window=7, windowed=(False, True, True)),
    "qwen2, llama 3's scaling": dataclasses.replace(QWEN2, rope_scaling=LLAMA_3.rope_scaling, head_dim=8),
    "qwen3, biases": dataclasses.replace(QWEN3, **BIASES, tie_word_embeddings=True, head_dim=24),
    "qwen3, windows": dataclasses.replace(QWEN3, sliding_window=7, windowed=(False, True, True), rope_scaling=LINEAR),
    "gemma-2, full": dataclasses.replace(
        *(GEMMA_2,), **BIASES, sliding_window=None, windowed=(True,), attention_softcap=None, logits_softcap=None
    ),
    "gemma-2, SiLU": dataclasses.replace(GEMMA_2, hidden_act="silu", windowed=(False, True, True), rope_theta=1e3),
    "gemma-3, capped": dataclasses.replace(GEMMA_3, logits_softcap=3.0, rope_scaling=None, windowed=(True, False)),
    "gemma-3, biases": dataclasses.replace(GEMMA_3, **BIASES, windowed=(True,), local_rope_theta=500.0),
    "phi-4-mini, long": dataclasses.replace(
        PHI_4_MINI,
        rope_scaling=dataclasses.replace(PHI_4_MINI.rope_scaling or LINEAR, original_max_position_embeddings=32),
    ),
    "smollm3, windows": dataclasses.replace(
        *(SMOLLM3,), **BIASES, mlp_bias=True, sliding_window=7, windowed=(False, True, False)
    ),
    "smollm3, all rotated": dataclasses.replace(
        SMOLLM3, rotated=(True,), rope_scaling=LINEAR, tie_word_embeddings=False
    ),
    "granite, biases": dataclasses.replace(GRANITE, **BIASES, mlp_bias=True, tie_word_embeddings=False),
    "granite, linear": dataclasses.replace(GRANITE, rope_scaling=LINEAR, attention_scale=0.015625, logits_divisor=0.5),
    "olmo-2, biases": dataclasses.replace(OLMO_2, **BIASES, num_key_value_heads=4, tie_word_embeddings=True),
    "mixtral, one": dataclasses.replace(MIXTRAL, num_experts_per_tok=1, sliding_window=7, tie_word_embeddings=True),
    "mixtral, balanced": dataclasses.replace(MIXTRAL, router_aux_loss_coef=0.1, num_key_value_heads=4, head_dim=24),
    "qwen3-moe, plain weights": dataclasses.replace(QWEN3_MOE, norm_topk_prob=False, router_aux_loss_coef=0.0),
    "qwen3-moe, all": dataclasses.replace(*(QWEN3_MOE,), **BIASES, num_experts_per_tok=8, sliding_window=7),
    "olmo-2, linear": dataclasses.replace(OLMO_2, rope_scaling=LINEAR, rms_norm_eps=1e-3, head_dim=16),
}
"""With `FAMILIES`, three models or more of each family, which together use its every option."""


def random_params(config, dtype="float32"):
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda w: jax.numpy.asarray(random.normal(0.0, 0.2, w.shape), w.dtype), param_shapes(config, dtype)
    )


def tensors_in(params, config):
    """Return every tensor by its name, laid out as in a file."""
    tensors = {}
    for tensor in tensors_of(config):
        value = params
        for name in tensor.path:
            value = value[name]
        value = np.asarray(value[tensor.index])
        tensors[tensor.name] = np.ascontiguousarray(value.T if tensor.is_transposed else value)
    return tensors


def experts_together(tensors):
    """Stack the matrices of all experts of a layer, as llama.cpp's converter does."""
    together = {}
    for name, value in tensors.items():
        together.setdefault(re.sub(r"experts\.\d+\.", "experts.", name), []).append(value)
    return {name: np.stack(values) if ".experts." in name else values[0] for name, values in together.items()}


def pairs_together(x, heads):
    """Lay out queries and keys as llama.cpp's converter does for a Llama."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
}
AFTER = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
"""The names of norms that come after attention and MLP."""


def gguf_name(name, names=GGUF_NAMES):
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, rest = module.split(".", 3)
        return f"blk.{layer}.{names[rest]}.{kind}"
    return f"{names[module]}.{kind}"


PAIRED = ("llama", "granite", "smollm3")
"""The architectures whose queries and keys llama.cpp's converter permutes."""


def gguf_metadata(config):
    """What llama.cpp's converter writes about a model besides the sizes of all."""
    values = {
        "vocab_size": config.vocab_size,
        "attention.key_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logits_softcap,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts and config.num_experts_per_tok,
        "expert_feed_forward_length": config.num_experts and config.intermediate_size,
        "attention.scale": config.attention_scale if config.residual_scale != 1 else None,
        "embedding_scale": config.embedding_scale if config.residual_scale != 1 else None,
        "residual_scale": config.residual_scale if config.residual_scale != 1 else None,
        "logit_scale": config.logits_divisor if config.residual_scale != 1 else None,
    }
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if scaling is not None and scaling.rope_type == "longrope":
        values["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
        values["rope.scaling.attn_factor"] = scaling.attention_factor
    return {name.replace(".", "__"): value for name, value in values.items() if value is not None}


def write_gguf(
    path, config, tensors, kind: int = GGMLQuantizationType.F32, architecture="llama", divisors=None, **changes
):
    """Write a GGUF file of tensors with Hugging Face's names. Matrices have the kind, so rows must be whole blocks."""
    writer = GGUFWriter(path, architecture)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in changes.items():
        writer.add_key_value(key.replace("__", "."), value, *_type_of(value))
    kind = GGMLQuantizationType(kind)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = GGUF_NAMES | (AFTER if config.norms != "before" else {}) | {"pre_feedforward_layernorm": "ffn_norm"}
    for name, value in experts_together(tensors).items():
        module = name.split(".")[-2] if "." in name else ""
        if architecture in PAIRED and module in heads:
            value = pairs_together(value, heads[module])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + np.float32(1)
        of_kind = kind if value.ndim > 1 else GGMLQuantizationType.F32
        stored = value.astype(np.float32) if of_kind == GGMLQuantizationType.F32 else quantize(value, of_kind)
        known = name.startswith(("model.", "lm_head."))
        writer.add_tensor(gguf_name(name, names) if known else name, stored, raw_dtype=of_kind)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(divisors, np.float32))
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "longrope":
        for of, factors in (("short", config.rope_scaling.short_factor), ("long", config.rope_scaling.long_factor)):
            writer.add_tensor(f"rope_factors_{of}.weight", np.asarray(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _type_of(value):
    from gguf import GGUFValueType

    return [
        GGUFValueType.STRING
        if isinstance(value, str)
        else GGUFValueType.FLOAT32
        if isinstance(value, float)
        else GGUFValueType.UINT32
    ]
