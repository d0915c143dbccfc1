"""What others' models with lists of layers need, by the compilers for chips that are not there.

    pip install google-tunix 'adalomo-jax[tpu-aot]'
    python examples/lists_of_layers.py tpu-v5e llama-2-7b qwen3-8b gemma3-4b

The models are tunix's, as they are: layers in a list, each under its own remat, bfloat16, one sequence of 2,048 tokens,
a loss in chunks of 256. What a user changes are two lines: ``params = step.place(params, tokens)`` after the step is
made, and ``step.unplace(params)`` before the model is saved. Nothing is allocated and nothing is run.
"""

import dataclasses
import importlib
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


def llama(name):
    """tunix's Llama of LLaMA-7B's sizes."""
    tunix = importlib.import_module("tunix.models.llama3.model")
    sizes = dict(num_layers=32, vocab_size=32000, embed_dim=4096, hidden_dim=11008, num_heads=32, num_kv_heads=32)
    config = tunix.ModelConfig(**sizes, head_dim=128, rope_theta=10000, norm_eps=1e-5)
    return tunix.Llama3, dataclasses.replace(config, remat_config=tunix.RematConfig.DECODER)


def qwen3(name):
    """tunix's Qwen3-8B."""
    tunix = importlib.import_module("tunix.models.qwen3.model")
    return tunix.Qwen3, dataclasses.replace(tunix.ModelConfig.qwen3_8b(), remat_config=tunix.RematConfig.DECODER)


def gemma3(name):
    """tunix's Gemma3-4B, text only: five layers of each six see what is near."""
    tunix = importlib.import_module("tunix.models.gemma3.model")
    return tunix.Gemma3, dataclasses.replace(tunix.ModelConfig.gemma3_4b_pt(), remat_config=tunix.RematConfig.DECODER)


MODELS = {"llama-2-7b": llama, "qwen3-8b": qwen3, "gemma3-4b": gemma3}


def loss_of(graphdef):
    """The mean cross-entropy of the next token, the logits in chunks."""

    def loss_fn(params, tokens):
        model = nnx.merge(graphdef, params)
        positions, mask = jnp.arange(LENGTH)[None], jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))
        x = model.embedder.encode(tokens)
        for layer in model.layers:
            _, x = layer(x, positions, None, mask)
        x, head = model.final_norm(x), model.lm_head if hasattr(model, "lm_head") else model.embedder.decode

        @jax.checkpoint
        def chunk(total, x_and_targets):
            x, targets = x_and_targets
            logits = head(x).astype(jnp.float32)
            is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
            picked = jnp.sum(jnp.where(is_target, logits, 0.0), -1)
            return total + jnp.sum(jax.nn.logsumexp(logits, -1) - picked), None

        chunks = lambda x: x.reshape(1, LENGTH // CHUNK, CHUNK, *x.shape[2:]).swapaxes(0, 1)
        total, _ = jax.lax.scan(chunk, jnp.float32(0), (chunks(x), chunks(jnp.roll(tokens, -1, 1))))
        return total / LENGTH

    return loss_fn


def measure(name, target, *, layers=None, roll=True, fused=True):
    """Bytes and seconds, as a dict."""
    model, config = MODELS[name](name)
    config = config if layers is None else dataclasses.replace(config, num_layers=layers)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    tokens, step = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32), fuse(loss_of(graphdef), adalomo(1e-3), roll=roll)
    if fused:
        params = step.place(params, tokens)
    usage = compile_usage(step, params, tokens, target=TARGETS[target], fused=fused)
    gigabytes = lambda n: round(n / 1e9, 2)
    return {
        "model": name,
        "package": "google-tunix",
        "target": target,
        "layers": config.num_layers,
        "step": "unfused" if not fused else "fused, stacked" if roll else "fused, in a list",
        "weights_gb": gigabytes(usage.params_bytes),
        "peak_gb": gigabytes(usage.peak_bytes),
        "fits": usage.fits,
        "compile_seconds": round(usage.compile_seconds),
    }


def main(target="tpu-v5e", *names, layers=None):
    """A line of JSON for each model and step."""
    for name in names or MODELS:
        for how in ({}, {"roll": False}, {"fused": False}):
            print(json.dumps(measure(name, target, layers=layers, **how)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
