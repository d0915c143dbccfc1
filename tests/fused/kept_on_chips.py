"""Compiles a decoder with kept weights for an absent chip, and prints what its step and its evaluation need, as JSON.

python tests/fused/kept_on_chips.py tpu-v5e int8    # or h100, bf16+8
"""

import dataclasses
import json
import re
import sys
from typing import cast

import jax
from compiled import memory_of
from jax.sharding import SingleDeviceSharding

from adalomo_jax.memory import TARGETS
from adalomo_jax.memory.compile import place
from adalomo_jax.memory.targets import devices_of, prepare
from adalomo_jax.models import PRESETS
from adalomo_jax.models.weights import Weights
from adalomo_jax.optimizers.kept import is_kept
from adalomo_jax.training.config import FinetuneConfig
from adalomo_jax.training.program import abstract_params, make_training, tree_bytes

LAYERS = 48
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 1024}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 256}


def main():
    target, weights = TARGETS[sys.argv[1]], cast(Weights, sys.argv[2])
    prepare(target)
    model = dataclasses.replace(PRESETS["llama-2-7b"], **SIZES, **HEADS)
    options = FinetuneConfig(batch_size=1, seq_len=256, dtype="bfloat16", weights=weights)
    training = make_training(options, model, platform=target.platform)
    on = SingleDeviceSharding(devices_of(target)[0])
    params, args = place((abstract_params(training, None), training.args), on)
    state = place(training.step.abstract_state(params, *args), on)
    batches = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8, *x.shape), x.dtype, sharding=on), args[0])
    step = training.step.jit.lower(params, state, *args).compile()
    evaluation = jax.jit(training.evaluate).lower(params, batches).compile()
    kept = [x for x in jax.tree.leaves(params, is_leaf=is_kept) if is_kept(x)]
    shapes = {",".join(map(str, shape)) for x in kept for shape in (x.shape, jax.tree.leaves(x)[0].shape)}
    wide = "f32|f16|s32|u32" + ("|bf16" if weights == "int8" else "")
    floats = re.compile(rf"(?:{wide})\[(?:{'|'.join(shapes)})\]")
    found = {
        "least_stack": min(tree_bytes(x) for x in kept),
        "params_and_state": tree_bytes((params, state)),
        "in_place": memory_of(step).alias_size_in_bytes,
        "saved": training.step.saved_bytes(params, *args),
    }
    for name, compiled in (("step", step), ("evaluation", evaluation)):
        found[name] = {
            "temporaries": memory_of(compiled).temp_size_in_bytes,
            "floats_of_stacks": sorted(set(floats.findall(compiled.as_text() or ""))),
        }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
