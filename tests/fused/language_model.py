"""A small language model in plain JAX, in the forms that the engine must handle."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, DIM, HIDDEN = 32, 16, 24

REMATS = {
    "no remat": lambda f: f,
    "remat": jax.checkpoint,
    "dots saved": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "everything saved": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.everything_saveable),
}


def init_params(
    layers: int | list[int] = 4, *, dim=DIM, hidden=HIDDEN, vocab=VOCAB, tied=False, dtype=jnp.float32, seed=0
):
    """The parameters; ``layers`` is one number, or one for each of several stacks."""
    counts = [layers] if isinstance(layers, int) else layers
    rng = np.random.default_rng(seed)  # JAX's would compile a program for each shape
    normal = lambda *shape: jnp.asarray(0.3 * rng.standard_normal(shape), dtype)
    ones = lambda *shape: jnp.asarray(np.ones(shape), dtype)
    params: dict[str, Any] = {"embed": normal(vocab, dim), "norm": ones(dim)}
    if not tied:
        params["head"] = normal(dim, vocab)
    for s, n in enumerate(counts):
        params[f"layers{s}"] = {
            "scale": ones(n, dim),
            "mix": normal(n, dim, dim),
            "up": normal(n, dim, hidden),
            "down": normal(n, hidden, dim),
        }
    return params


def batch(seed=0, *, batch_size=2, length=8, vocab=VOCAB):
    """Tokens of shape ``[batch, length]``."""
    return jnp.asarray(np.random.default_rng(100 + seed).integers(0, vocab, (batch_size, length)), jnp.int32)


def normalize(x, scale):
    """RMSNorm."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * scale


def layer(x, w):
    """One residual layer: mixes positions causally, then widens."""
    h = normalize(x, w["scale"]) @ w["mix"]
    x = x + jnp.cumsum(h, axis=1) / (1 + jnp.arange(x.shape[1], dtype=x.dtype))[:, None]
    return x + jax.nn.silu(normalize(x, w["scale"]) @ w["up"]) @ w["down"]


def make_loss(remat="remat", *, aux=False, in_jit=False, unroll=1):
    """``loss_fn(params, tokens)``: mean next-token cross-entropy, with scanned layers."""

    def loss_fn(params, tokens):
        body = REMATS[remat](lambda x, w: (layer(x, w), None))
        x = params["embed"][tokens]
        for stack in sorted(name for name in params if name.startswith("layers")):
            x, _ = jax.lax.scan(body, x, params[stack], unroll=unroll)
        x = normalize(x, params["norm"])
        logits = x @ (params["head"] if "head" in params else params["embed"].T)
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        loss = -jnp.mean(jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1))
        return (loss, {"logits": logits, "mean": jnp.mean(x)}) if aux else loss

    return jax.jit(loss_fn) if in_jit else loss_fn
