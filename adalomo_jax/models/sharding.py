"""How a Llama's parameters and batches are spread over a mesh of devices: data, FSDP and tensor parallelism.

- ``data``: each device has all parameters, and some sequences of the batch.
- ``fsdp``: like ``data``, but parameters are cut along the axis of the residual stream, and gathered layer by layer.
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

_OUT_OF_STREAM = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "lm_head")
_INTO_STREAM = ("o_proj", "down_proj", "embed_tokens")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes ``data``, ``fsdp`` and ``tensor``; axes that are not named have the size 1.

    Args:
      sizes: the sizes of the axes, by name.
      devices: as many devices as the product of the sizes; by default, those of ``jax.devices()``.

    Raises:
      ValueError: an axis has another name, or the number of devices does not match.

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
    """The sharding of arrays whose first axis is the sequences of a batch."""
    return NamedSharding(mesh, PartitionSpec(("fsdp", "data")))


def everywhere(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of arrays that each device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A tree like ``params`` of ``NamedSharding``s.

    ``fsdp`` cuts matrices along the axis of the residual stream and ``tensor`` along the other, if the mesh divides
    them; layer axes are not cut. Norms are whole on each device, and so are biases that are added to the stream.

    Args:
      params: a nested dictionary of a ``Decoder``'s parameters, or of their shapes.
      mesh: made by `make_mesh`.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if names[-1] == "bias":  # its only axis is the matrix's last one; before it may be the layers'
            cut = names[-2] in _OUT_OF_STREAM and leaf.shape[-1] % mesh.shape["tensor"] == 0
            return NamedSharding(mesh, PartitionSpec(*(None,) * (len(leaf.shape) - 1), "tensor" if cut else None))
        if names[-2] in _OUT_OF_STREAM:
            return out_of_stream(leaf.shape, mesh)
        if names[-2] in _INTO_STREAM:
            return into_stream(leaf.shape, mesh)
        return everywhere(mesh)

    return jax.tree_util.tree_map_with_path(sharding, params)


def out_of_stream(shape: Sequence[int], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of a matrix, or a stack of them, whose rows belong to the residual stream, such as the head."""
    return _cut(shape, ("fsdp", "tensor"), mesh)


def into_stream(shape: Sequence[int], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of a matrix, or a stack of them, whose columns belong to the residual stream."""
    return _cut(shape, ("tensor", "fsdp"), mesh)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(x: jax.Array, axis: int, name: str) -> jax.Array:
    """Under ``shard_map``: gathers an array that is cut along an axis from the devices along a mesh axis.

    Equals ``all_gather``, but each device receives only its own part of the gradient, and sums it in float32. A TPU's
    compiler turns the sum that JAX would take into a sum of the whole gradient on each device (libtpu 0.0.52).
    """
    return jax.lax.all_gather(x, name, axis=axis, tiled=True)


def _gather_forward(x, axis, name):
    return gather(x, axis, name), None


def _gather_backward(axis, name, _, d):
    of_mine = jax.lax.all_to_all(d, name, split_axis=axis, concat_axis=axis, tiled=True)
    parts = of_mine.reshape(*d.shape[:axis], jax.lax.axis_size(name), -1, *d.shape[axis + 1 :])
    return (jnp.sum(parts, axis=axis, dtype=jnp.float32).astype(d.dtype),)


gather.defvjp(_gather_forward, _gather_backward)


def _cut(shape: Sequence[int], axes: tuple[str, str], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding that cuts the last two axes by these axes of the mesh, if they divide them."""
    cut = [axis if size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape[-2:])]
    return NamedSharding(mesh, PartitionSpec(*(None,) * (len(shape) - 2), *cut))
