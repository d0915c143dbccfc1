"""Programs of small arrays, and what a chip's rules make of them."""

import jax
import jax.numpy as jnp

from adalomo_jax.fused.plan.jaxpr import trace
from adalomo_jax.memory.liveness import temporary_bytes
from adalomo_jax.memory.placement import Chip

N = 64
SQUARE = (N, N)
STACK = (8, N, N)
ARRAY = N * N * 4
"""Bytes of a square."""


def traced(fn, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return trace(lambda leaves: fn(*leaves), arguments)[0]


def temporaries(fn, *shapes, in_place=(), **options):
    return temporary_bytes(traced(fn, *shapes), dict(in_place), **options)


def tpu(vector_bytes=0, **more):
    return Chip("tpu", vector_bytes, **more)
