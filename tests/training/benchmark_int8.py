"""Prints how well variants of int8 weights train, beside the default: blocks, scales, and rounding.

    python tests/training/benchmark_int8.py FOLDER [variant] [seed]

Each run is one of examples/further_pretraining.py: SmolLM2-135M on Shakespeare, 100 steps of 512 tokens. It takes a
quarter of an hour or more on a core. The text is fetched into FOLDER.
"""

import dataclasses
import importlib
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp

from adalomo_jax.commands.finetune import run
from adalomo_jax.training.config import FinetuneConfig

int8 = importlib.import_module("adalomo_jax.optimizers.int8")  # the package has a function of this name
EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "further_pretraining.py"))


def in_blocks_of(n: int) -> Callable[[], object]:
    """At most ``n`` neighbours share a scale."""
    block_of = int8._block_of
    return lambda: setattr(int8, "_block_of", lambda size, most: block_of(size, n))


def with_headroom_to(largest: int) -> Callable[[], object]:
    """A new scale gives this value to the largest weight of its block."""
    return lambda: setattr(int8, "_LARGEST", largest)


def with_scales_that_follow() -> None:
    """A block has a new scale whenever its largest weight changes, and its weights are then rounded anew."""

    def add(self, update, key):
        old, at = self.values.astype(jnp.float32), self.ndim + 1 + self.axis
        old_scales = jnp.expand_dims(self.scales.astype(jnp.float32), at)
        update = int8._cut(update.astype(jnp.float32), self.values.shape[self.axis], self.axis)
        new = old * old_scales + jnp.where(jnp.isfinite(update), update, 0)
        scales = int8._scale(jnp.max(jnp.abs(new), axis=self.axis, keepdims=True), self.dtype)
        stays = scales == old_scales
        added = jnp.where(stays, update / old_scales, new / scales)
        values = int8._as_int8(jnp.where(stays, old, 0) + int8._rounded(added, key))
        return dataclasses.replace(self, values=values, scales=jnp.squeeze(scales, at).astype(jnp.bfloat16))

    int8.Int8.add = add  # type: ignore[method-assign]


VARIANTS: dict[str, tuple[Callable[[], object], dict[str, bool]]] = {
    "blocks of 128": (lambda: None, {}),
    "blocks of 64": (in_blocks_of(64), {}),
    "blocks of 32": (in_blocks_of(32), {}),
    "a row": (in_blocks_of(4096), {}),
    "headroom to 125": (with_headroom_to(125), {}),
    "scales that follow": (with_scales_that_follow, {}),
    "to nearest": (lambda: None, {"stochastic_rounding": False}),
}


def main(folder: str, variant: str = "blocks of 128", seed: str = "0") -> None:
    text = EXAMPLE["shakespeare"](Path(folder) / "text")
    change, options = VARIANTS[variant]
    change()
    output = Path(folder) / f"{variant}-{seed}".replace(" ", "-")
    options = EXAMPLE["MANY"] | {"learning_rate": 1e-3, "weights": "int8", "seed": int(seed)} | options
    run(FinetuneConfig(model="smollm2", data=(text,), output=output, checkpoint_every=0, **options))
    print(f"{variant}, seed {seed}: {json.loads((output / 'summary.json').read_text())['eval_loss']:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
