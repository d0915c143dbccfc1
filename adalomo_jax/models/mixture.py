"""The layer of a mixture of experts: its router, its experts, and how evenly the tokens are spread over them.

Letters in names of arrays: as in `experts` and `decoder`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from adalomo_jax.models.config import DecoderConfig
from adalomo_jax.models.experts import Experts, choose, mixture
from adalomo_jax.models.parts import INIT, activation, linear
from adalomo_jax.models.sharding import gather, into_stream, out_of_stream


class Balance(NamedTuple):
    """How a layer's router spreads tokens, without padding; with a leading axis, how those of all layers do."""

    count_E: jax.Array
    """How many tokens chose each expert, float32."""
    probability_E: jax.Array
    """The sum over tokens of each expert's probability, float32."""
    tokens: jax.Array
    """How many tokens there are, float32."""


class Matrices(nnx.Module):
    """One matrix of each expert."""

    def __init__(self, experts: int, size_in: int, size_out: int, *, rngs: nnx.Rngs, dtype):
        self.kernel = nnx.Param(INIT(rngs.params(), (experts, size_in, size_out), dtype))


class ExpertMatrices(nnx.Module):
    """The three matrices of each expert, under Hugging Face's names."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype):
        assert config.num_experts is not None
        E, D, F = config.num_experts, config.hidden_size, config.intermediate_size
        self.gate_proj = Matrices(E, D, F, rngs=rngs, dtype=dtype)
        self.up_proj = Matrices(E, D, F, rngs=rngs, dtype=dtype)
        self.down_proj = Matrices(E, F, D, rngs=rngs, dtype=dtype)


class Mixture(nnx.Module):
    """A router, ``gate``, and gated MLPs, of which each token passes through those that are likeliest for it."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype, sharding: NamedSharding | None = None):
        assert config.num_experts is not None
        self.gate = linear(config.hidden_size, config.num_experts, rngs=rngs, dtype=dtype)
        self.experts = ExpertMatrices(config, rngs=rngs, dtype=dtype)
        self.config, self.sharding = config, sharding

    def __call__(self, x_BTD: jax.Array, is_text_BT: jax.Array | None = None) -> tuple[jax.Array, Balance]:
        """The weighted sum of the experts' results, and how the router spreads the tokens that are no padding."""
        (B, T, D), config, act = x_BTD.shape, self.config, activation(self.config)
        expert_NK, weight_NK, probability_NE = choose(
            self.gate(x_BTD).reshape(B * T, -1), config.num_experts_per_tok, normalized=config.norm_topk_prob
        )
        kernels = self.experts.gate_proj.kernel, self.experts.up_proj.kernel, self.experts.down_proj.kernel
        arguments = x_BTD.reshape(B * T, D), expert_NK, weight_NK, Experts(*(kernel[...] for kernel in kernels))
        if self.sharding is None or self.sharding.mesh.size == 1:
            out_ND = jnp.asarray(mixture(*arguments, act))
        else:
            out_ND = _mixture_on_mesh(*arguments, act, self.sharding)
        is_text_N1 = jnp.ones((B * T, 1)) if is_text_BT is None else is_text_BT.reshape(-1, 1).astype(jnp.float32)
        weighed = lambda x_NE: jnp.sum(is_text_N1 * x_NE, axis=0)
        chosen_NE = jnp.sum(jax.nn.one_hot(expert_NK, probability_NE.shape[1]), axis=1)
        balance = Balance(weighed(chosen_NE), weighed(probability_NE), jnp.sum(is_text_N1))
        return out_ND.reshape(B, T, D), balance


def balancing_loss(balance: Balance) -> jax.Array:
    """``E * sum over experts of (share of tokens that chose it) * (its mean probability)``, over all layers' tokens.

    It is the number of experts of a token if all are chosen alike, and more if not.

    Args:
        balance: with a leading axis for layers.

    Source: Fedus et al., Switch Transformers (2022), arXiv:2101.03961, equations 4 to 6, as transformers computes it.
    """
    count_E, probability_E, tokens = (jnp.sum(x, axis=0) for x in balance)
    tokens = jnp.maximum(tokens, 1)
    return count_E.size * jnp.sum(count_E / tokens * (probability_E / tokens))


def _mixture_on_mesh(x_ND, expert_NK, weight_NK, experts: Experts, act, sharding: NamedSharding) -> jax.Array:
    """`mixture` of each device's own tokens, with its own part of each expert's width.

    With FSDP each device gathers the experts of a layer, without their ``tensor`` parts.
    """
    mesh = sharding.mesh
    cuts = Experts(*(of(w.shape, mesh).spec for of, w in zip((out_of_stream, out_of_stream, into_stream), experts)))
    is_cut = {name for spec in cuts for name in spec if name is not None and mesh.shape[name] > 1}

    def whole_in_stream(w, spec):
        return gather(w, spec.index("fsdp"), "fsdp") if "fsdp" in is_cut and "fsdp" in spec else w

    def of_part(x_ND, expert_NK, weight_NK, experts):
        experts = Experts(*map(whole_in_stream, experts, cuts))
        out_ND = jnp.asarray(mixture(x_ND, expert_NK, weight_NK, experts, act))
        return jax.lax.psum(out_ND, "tensor") if "tensor" in is_cut else out_ND

    of_tokens = PartitionSpec(sharding.spec[0])
    in_specs = (of_tokens, of_tokens, of_tokens, cuts)
    on_parts = jax.shard_map(of_part, mesh=mesh, in_specs=in_specs, out_specs=of_tokens, check_vma=False)
    return on_parts(x_ND, expert_NK, weight_NK, experts)
