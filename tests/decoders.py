"""Small decoders in the style of jax-ml/bonsai: lists of layers in NNX, with caches, masks and shardings."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

LENGTH, CACHED, VOCAB = 8, 16, 32
TOKENS = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, VOCAB)
SEGMENTS = jnp.asarray([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2, 2]])
"""Segments of a sequence with padding on its left, and of one with two documents."""


class Reach(Enum):
    """The tokens that a layer attends to."""

    ALL = "full_attention"
    NEAR = "sliding_attention"


@dataclass(frozen=True)
class Config:
    """A configuration that has no hash: it holds a list and a dict."""

    layers: int = 4
    dim: int = 8
    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 4
    reach: list[Reach] = field(default_factory=list)
    sharding: dict[str, Any] = field(default_factory=lambda: {"activation": None, "kernel": None})
    dtype: Any = jnp.float32


class Cache(nnx.Module):
    """Keys and values of one layer."""

    def __init__(self, config: Config, batch: int):
        shape = (batch, CACHED, config.kv_heads, config.head_dim)
        self.k, self.v = nnx.Cache(jnp.zeros(shape, config.dtype)), nnx.Cache(jnp.zeros(shape, config.dtype))
        self.start = nnx.Variable(jnp.full((batch,), -1, jnp.int32))
        self.at = nnx.Variable(jnp.zeros((), jnp.int32))


def caches(config: Config) -> nnx.List:
    return nnx.List([Cache(config, len(TOKENS)) for _ in range(config.layers)])


class Norm(nnx.Module):
    """An RMS norm in float32; its scale is an offset from one."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.zeros(dim))

    @jax.named_scope("rms_norm")
    def __call__(self, x):
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + 1e-6)
        return (wide * (1.0 + self.scale[...])).astype(x.dtype)


class Linear(nnx.Module):
    """A product with a given sharding; in place of a bias it adds zeros that are not a parameter."""

    def __init__(self, rows: int, columns: int, config: Config, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (rows, columns), out_sharding=config.sharding["kernel"]))
        self.bias = nnx.data(jnp.zeros(columns))
        self.config = config

    def __call__(self, x):
        return jnp.matmul(x, self.kernel[...], out_sharding=self.config.sharding["activation"]) + self.bias


class Einsum(nnx.Module):
    """A product with a kernel of rank 3."""

    def __init__(self, equation: str, shape: tuple[int, ...], rngs: nnx.Rngs):
        self.equation, self.shape = equation, shape
        self.w = nnx.Param(0.3 * jax.random.normal(rngs.params(), shape))

    @jax.named_scope("einsum")
    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


def positions_of(segments):
    """Positions from a scan: each document starts at zero, and padding is far away."""

    def step(before, segment):
        position = jnp.where((segment == 0) | (segment != before[0]), 0, before[1] + 1)
        return (segment, position), jnp.where(segment == 0, 2**30, position)

    zeros = jnp.zeros_like(segments[:, 0])
    return jax.lax.scan(step, (zeros, zeros), segments.T)[1].T


def rotate(x, positions, theta):
    angles = jnp.einsum("BT,k->BTk", positions, theta ** -jnp.linspace(0, 1, x.shape[-1] // 2), precision="highest")
    sin, cos = jnp.sin(angles)[:, :, None], jnp.cos(angles)[:, :, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped heads with norms on queries and keys, with a cache or without one."""

    def __init__(self, config: Config, reach: Reach, rngs: nnx.Rngs):
        width = (config.dim, config.kv_heads, config.head_dim)
        self.q = Einsum("BTD,DNH->BTNH", (config.dim, config.heads, config.head_dim), rngs)
        self.k, self.v = Einsum("BSD,DKH->BSKH", width, rngs), Einsum("BSD,DKH->BSKH", width, rngs)
        self.out = Einsum("BTNH,NHD->BTD", (config.heads, config.head_dim, config.dim), rngs)
        self.q_norm, self.k_norm = Norm(config.head_dim), Norm(config.head_dim)
        self.theta = 1e6 if reach is Reach.ALL else 1e4

    def __call__(self, x, cache, segments, mask):
        positions = positions_of(segments)
        if cache is not None:
            pads = jnp.sum(jnp.cumsum(segments != 0, -1) == 0, -1)
            cache.start[...] = jnp.where(cache.start[...] < 0, pads, cache.start[...])
            positions = positions + cache.at[...]
        q, k = (
            rotate(self.q_norm(self.q(x)), positions, self.theta),
            rotate(self.k_norm(self.k(x)), positions, self.theta),
        )
        v = self.v(x)
        if cache is not None:
            for held, new in ((cache.k, k), (cache.v, v)):
                held[...] = jax.lax.dynamic_update_slice(held[...], new, (0, cache.at[...], 0, 0))
            k, v = cache.k[...], cache.v[...]
            mask = mask & (jnp.arange(CACHED) >= cache.start[...][:, None])[:, None]
            cache.at[...] = cache.at[...] + x.shape[1]
        return self.out(jax.nn.dot_product_attention(q, k, v, mask=mask[:, None]))


class Layer(nnx.Module):
    """Attention and a gated feed-forward layer."""

    def __init__(self, config: Config, reach: Reach, rngs: nnx.Rngs):
        self.before, self.between = Norm(config.dim), Norm(config.dim)
        self.attention = Attention(config, reach, rngs)
        self.gate, self.up = (Linear(config.dim, config.hidden, config, rngs) for _ in range(2))
        self.down = Linear(config.hidden, config.dim, config, rngs)

    @jax.named_scope("decoder_layer")
    def __call__(self, x, cache, segments, mask):
        x = x + self.attention(self.before(x), cache, segments, mask)
        y = self.between(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Decoder(nnx.Module):
    """Computes its logits with the embedding."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, config.dim)))
        self.scale = jnp.asarray(config.dim**0.5, jnp.bfloat16).astype(jnp.float32)
        self.layers = nnx.List([Layer(config, reach, rngs) for reach in reaches(config)])
        self.norm = Norm(config.dim)

    def __call__(self, tokens, segments, cache=None):
        keys = jnp.arange(LENGTH if cache is None else CACHED)
        causal = jnp.arange(LENGTH)[:, None] >= keys
        if cache is None:
            causal = causal & (segments[:, :, None] == segments[:, None, :])
        masks = {Reach.ALL: causal, Reach.NEAR: causal & (jnp.arange(LENGTH)[:, None] - keys < 3)}
        x = self.embedding[...].at[tokens].get(out_sharding=self.config.sharding["activation"]) * self.scale
        for i, (reach, layer) in enumerate(zip(reaches(self.config), self.layers)):
            mask = jnp.broadcast_to(masks[reach], (len(tokens), LENGTH, len(keys)))
            x = layer(x, None if cache is None else cache[i], segments, mask)
        return jnp.dot(self.norm(x), self.embedding[...].T)


def reaches(config: Config) -> list[Reach]:
    return config.reach or [Reach.ALL] * config.layers
