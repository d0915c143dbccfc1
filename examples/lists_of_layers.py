"""Asks compilers for absent chips how much memory others' models with lists of layers need.

    pip install google-tunix 'adalomo-jax[tpu-aot]'
    python examples/lists_of_layers.py tpu-v5e llama-2-7b gemma3-4b

The models are tunix's, unmodified, in bfloat16. Each layer has its own remat, a batch has 1 x 2048 tokens, and the loss
is computed in chunks. A user changes two lines, ``step.place`` and ``step.unplace``. The script allocates nothing and
runs nothing.
"""

import dataclasses
import importlib
import inspect
import json
import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from flax import nnx

from adalomo_jax import adalomo, fuse
from adalomo_jax.memory import TARGETS, compile_usage

LENGTH, CHUNK = 2048, 256
LLAMA_2_7B = dict(num_layers=32, vocab_size=32000, embed_dim=4096, hidden_dim=11008, num_heads=32, num_kv_heads=32)
LLAMA_2_7B |= dict(head_dim=128, rope_theta=10000, norm_eps=1e-5)
MODELS = {
    "llama-2-7b": ("llama3", "Llama3", lambda config: config(**LLAMA_2_7B)),
    "qwen2.5-7b": ("qwen2", "Qwen2", lambda config: config.qwen2p5_7b()),
    "qwen3-8b": ("qwen3", "Qwen3", lambda config: config.qwen3_8b()),
    "gemma2-2b": ("gemma", "Gemma", lambda config: config.gemma2_2b()),
    "gemma3-4b": ("gemma3", "Gemma3", lambda config: config.gemma3_4b_pt()),
}
"""Each model's module in tunix, its class, and a function that makes its configuration."""


def loss_of(graphdef):
    """The mean cross-entropy of the next token, with the logits in chunks."""

    def loss_fn(params, tokens):
        model = nnx.merge(graphdef, params)
        positions, mask = jnp.arange(LENGTH)[None], jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))
        if "output_hidden_states" in inspect.signature(model).parameters:
            model(tokens, positions, None, mask, output_hidden_states=True)  # its logits are not read, so not computed
            (x,) = jax.tree.leaves(nnx.pop(model, nnx.Intermediate))
        else:
            x = model.embedder.encode(tokens)
            for layer in model.layers:  # Llama
                _, x = layer(x, positions, None, mask)
            x = model.final_norm(x)
        head, cap = getattr(model, "lm_head", model.embedder.decode), getattr(model, "final_logits_softcap", None)

        @jax.checkpoint
        def chunk(total, x_and_targets):
            x, targets = x_and_targets
            logits = head(x).astype(jnp.float32)
            logits = cap * jnp.tanh(logits / cap) if cap else logits
            is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
            picked = jnp.sum(jnp.where(is_target, logits, 0.0), -1)
            return total + jnp.sum(jax.nn.logsumexp(logits, -1) - picked), None

        chunks = lambda x: x.reshape(1, LENGTH // CHUNK, CHUNK, *x.shape[2:]).swapaxes(0, 1)
        total, _ = jax.lax.scan(chunk, jnp.float32(0), (chunks(x), chunks(jnp.roll(tokens, -1, 1))))
        return total / LENGTH

    return loss_fn


def measure(name, target, step, layers=None):
    """The memory that one step of a model needs."""
    module, model, make_config = MODELS[name]
    tunix = importlib.import_module(f"tunix.models.{module}.model")
    config = dataclasses.replace(make_config(tunix.ModelConfig), remat_config=tunix.RematConfig.DECODER)
    config = dataclasses.replace(config, num_layers=layers or config.num_layers)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: getattr(tunix, model)(config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    fused = fuse(loss_of(graphdef), adalomo(1e-3))
    if step == "stacked":
        params = fused.place(params, tokens)
    usage = compile_usage(fused, params, tokens, target=TARGETS[target], fused=step != "unfused")
    row = {"model": name, "package": "google-tunix", "target": target, "layers": config.num_layers, "step": step}
    row |= {"lines_changed": 2 * (step == "stacked"), "weights_gb": round(usage.params_bytes / 1e9, 2)}
    return row | {"peak_gb": round(usage.peak_bytes / 1e9, 2), "compile_seconds": round(usage.compile_seconds)}


def main(target="cpu", *names):
    """Prints a line of JSON for each model and step; for a CPU, Llama with two layers."""
    layers = 2 if target == "cpu" else None
    for name in names or (("llama-2-7b",) if layers else MODELS):
        for step in ("stacked", "in a list", "unfused"):
            print(json.dumps(measure(name, target, step, layers)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
