"""Asks a chip's compiler which training steps of a model fit on the chip, before anyone rents it.

    python examples/fit_on_one_chip.py                        # a small model, on this machine's CPU
    python examples/fit_on_one_chip.py llama-2-7b tpu-v5e     # needs adalomo-jax[tpu-aot], and no TPU

`adalomo-jax memory` does this for the steps of `adalomo-jax finetune`. Here you choose the loss, the optimizer and the
options of `fuse`.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from adalomo_jax import adalomo, fuse
from adalomo_jax.memory import TARGETS, compile_usage, prepare
from adalomo_jax.memory.usage import format_bytes
from adalomo_jax.models import PRESETS, Decoder, next_token_loss
from adalomo_jax.models.attention import kind_for


def main(preset="tiny", target="cpu"):
    chip, config = TARGETS[target], PRESETS[preset]
    prepare(chip)  # JAX starts without looking for the chip
    length = min(2048, config.max_position_embeddings)
    attention = kind_for(chip.platform, length, config.head_dim, jnp.bfloat16)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, attention=attention))
    graphdef, params = nnx.split(model)  # shapes: nothing is allocated
    params = nnx.to_pure_dict(params)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss_fn(params, tokens):
        return next_token_loss(nnx.merge(graphdef, params), tokens)

    steps = {
        "adamw, all gradients first": (fuse(loss_fn, optax.adamw(1e-5)), False),
        "adalomo, all gradients first": (fuse(loss_fn, adalomo(1e-3)), False),
        "adalomo, layer by layer": (fuse(loss_fn, adalomo(1e-3)), True),
        "and clipped, in 2 passes": (fuse(loss_fn, adalomo(1e-3), max_grad_norm=1.0), True),
    }
    print(f"{preset}, 1 x {length}, bfloat16, on {target} with {format_bytes(chip.limit_bytes)}")
    totals = []
    for name, (step, fused) in steps.items():
        usage = compile_usage(step, params, tokens, target=chip, fused=fused)
        totals.append(usage.peak_bytes)
        needs = f"{format_bytes(usage.peak_bytes):>10}, of which parameters {format_bytes(usage.params_bytes)}"
        print(f"  {name:<30} {needs:<42} {'fits' if usage.fits else 'does not fit'}")
    assert totals[2] < totals[1] < totals[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
