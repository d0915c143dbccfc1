"""Prints the memory of a layer of Qwen3-30B-A3B's experts by a chip's compiler, as `mixture` and by ``ragged_dot``.

python tests/models/benchmark_experts.py h100    # or tpu-v5e, rtx-4090, cpu
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from adalomo_jax.memory import TARGETS
from adalomo_jax.memory.targets import devices_of
from adalomo_jax.models import PRESETS
from adalomo_jax.models.experts import Experts, choose, mixture

CONFIG, TOKENS = PRESETS["qwen3-30b-a3b"], 2048


def by_ragged_dot(x_ND, expert_NK, weight_NK, experts, act):
    flat = expert_NK.reshape(-1)
    order, sizes = jnp.argsort(flat), jnp.bincount(flat, length=experts.up_EDF.shape[0])
    token = order // expert_NK.shape[1]
    gate, up = (jax.lax.ragged_dot(x_ND[token], w, sizes) for w in experts[:2])
    out = jax.lax.ragged_dot(act(gate) * up, experts.down_EFD, sizes)
    weighted = weight_NK.reshape(-1)[order][:, None] * out.astype(jnp.float32)
    return jnp.zeros(x_ND.shape, jnp.float32).at[token].add(weighted).astype(x_ND.dtype)


def main(target="cpu"):
    device = devices_of(TARGETS[target])[0]
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device))
    E, D, F = CONFIG.num_experts, CONFIG.hidden_size, CONFIG.intermediate_size
    args = of(TOKENS, D), of(D, E), Experts(of(E, D, F), of(E, D, F), of(E, F, D))
    for way, mix in {"mixture": mixture, "ragged_dot": by_ragged_dot}.items():

        def loss(x_ND, router_DE, experts, mix=mix):
            expert_NK, weight_NK, _ = choose(x_ND @ router_DE, CONFIG.num_experts_per_tok, normalized=True)
            out_ND = jnp.asarray(mix(x_ND, expert_NK, weight_NK, experts, jax.nn.silu))
            return jnp.sum(out_ND.astype(jnp.float32) ** 2)

        for name, f in (("forward", loss), ("gradient", jax.grad(loss, (0, 1, 2)))):
            analysis = jax.jit(f).lower(*args).compile().memory_analysis()
            assert analysis is not None
            print(f"{target}, {way}, {name}: {analysis.temp_size_in_bytes / 1e9:.3f} GB of temporaries", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
