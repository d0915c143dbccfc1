"""How a Llama's parameters and batches are spread over a mesh of devices: data, FSDP and tensor parallelism.

- ``data``: each device has all parameters, and some sequences of the batch.
- ``fsdp``: as ``data``, but parameters are cut along the axis of the residual stream, and gathered layer by layer.
- ``tensor``: heads, SwiGLU's width and the vocabulary are cut; each device computes with its part of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
"""The axes of a mesh, the outermost first."""

_OUT_OF_STREAM = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
_INTO_STREAM = ("o_proj", "down_proj", "embed_tokens")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes ``data``, ``fsdp`` and ``tensor``; those that are not named have the size 1.

    Args:
      sizes: of the axes.
      devices: as many as the sizes multiply to; JAX's own where they are not given.

    Raises:
      ValueError: for other axes, or where the number of devices is another one.

    Example:
      >>> print(dict(make_mesh({"fsdp": 1}, jax.devices()[:1]).shape))
      {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    unknown = [name for name in sizes if name not in AXES]
    if unknown or any(size < 1 for size in sizes.values()):
        raise ValueError(f"A mesh has the axes {', '.join(AXES)} with sizes of at least 1, got {dict(sizes)}.")
    shape = tuple(sizes.get(name, 1) for name in AXES)
    if math.prod(shape) != len(devices):
        say = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"The mesh {say} takes {math.prod(shape)} devices, but there are {len(devices)}.")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis are the sequences of a batch."""
    return NamedSharding(mesh, PartitionSpec(("fsdp", "data")))


def everywhere(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Of arrays that each device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A tree like ``params`` of ``NamedSharding``s.

    Matrices are cut along the axis of the residual stream by ``fsdp`` and along the other by ``tensor``, where the
    mesh divides them; layer axes are not cut. Norms are whole on each device.

    Args:
      params: nested dictionary of a ``Decoder``'s parameters, or of their shapes.
      mesh: made by `make_mesh`.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if names[-2] in _OUT_OF_STREAM:
            return out_of_stream(leaf.shape, mesh)
        if names[-2] in _INTO_STREAM:
            return _cut(leaf.shape, ("tensor", "fsdp"), mesh)
        return everywhere(mesh)

    return jax.tree_util.tree_map_with_path(sharding, params)


def out_of_stream(shape: Sequence[int], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Of a matrix, or a stack of them, whose rows belong to the residual stream: the head's, for one."""
    return _cut(shape, ("fsdp", "tensor"), mesh)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_rows(x_MN: jax.Array, axis: str) -> jax.Array:
    """Under ``shard_map``: the rows of a matrix that the devices along a mesh axis have, together.

    Equals ``all_gather``; but of its gradient each device receives what belongs to its rows, and sums that in float32.
    The sum that JAX would take, a TPU's compiler makes a sum of the whole gradient on each device (libtpu 0.0.52).
    """
    return jax.lax.all_gather(x_MN, axis, axis=0, tiled=True)


def _gather_rows_forward(x_MN, axis):
    return gather_rows(x_MN, axis), None


def _gather_rows_backward(axis, _, d_MN):
    of_my_rows = jax.lax.all_to_all(d_MN, axis, split_axis=0, concat_axis=0, tiled=True)
    parts = of_my_rows.reshape(jax.lax.axis_size(axis), -1, d_MN.shape[1])
    return (jnp.sum(parts, axis=0, dtype=jnp.float32).astype(d_MN.dtype),)


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


def _cut(shape: Sequence[int], axes: tuple[str, str], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The last two axes cut by those of the mesh that divide them."""
    cut = [axis if size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape[-2:])]
    return NamedSharding(mesh, PartitionSpec(*(None,) * (len(shape) - 2), *cut))
