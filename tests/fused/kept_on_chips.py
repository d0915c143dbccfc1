"""Compiles a decoder with int8 weights for absent chips, and prints what its step needs, one JSON line per chip.

python tests/fused/kept_on_chips.py tpu-v5e h100
"""

import dataclasses
import json
import re
import sys

import jax
from jax.sharding import SingleDeviceSharding

from adalomo_jax.memory import TARGETS
from adalomo_jax.memory.compile import place
from adalomo_jax.memory.targets import devices_of, prepare
from adalomo_jax.models import PRESETS
from adalomo_jax.optimizers.kept import is_kept
from adalomo_jax.training.config import FinetuneConfig
from adalomo_jax.training.program import abstract_params, make_training

LAYERS = 48
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 1024}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 256}


def main():
    targets = [TARGETS[name] for name in sys.argv[1:]]
    prepare(targets[0])
    model = dataclasses.replace(PRESETS["llama-2-7b"], **SIZES, **HEADS)
    options = FinetuneConfig(batch_size=1, seq_len=256, dtype="bfloat16", weights="int8")
    for target in targets:
        training = make_training(options, model, platform=target.platform)
        on = SingleDeviceSharding(devices_of(target)[0])
        params, args = place((abstract_params(training, None), training.args), on)
        state = place(training.step.abstract_state(params, *args), on)
        compiled = training.step.jit.lower(params, state, *args).compile()
        sizes, stacks = compiled.memory_analysis(), [x for x in jax.tree.leaves(params) if x.dtype == "int8"]
        kept = [x for x in jax.tree.leaves(params, is_leaf=is_kept) if is_kept(x)]
        shapes = {",".join(map(str, shape)) for x in kept for shape in (x.shape, x.values.shape)}
        floats = re.findall(rf"(?:f32|bf16)\[(?:{'|'.join(shapes)})\]", compiled.as_text() or "")
        print(
            json.dumps(
                {
                    "target": target.name,
                    "stacks": sum(x.size for x in stacks),
                    "one_stack": max(x.size for x in stacks),
                    "params_and_state": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state))),
                    "in_place": sizes.alias_size_in_bytes,
                    "temporaries": sizes.temp_size_in_bytes,
                    "saved": training.step.saved_bytes(params, *args),
                    "floats_of_stacks": sorted(set(floats)),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
