"""How parameters are sharded over a mesh of devices, and how arrays made from them are sharded alike.

On an automatic mesh XLA chooses how to shard its results. Left alone, it may gather a whole stack of layers, or
sum a whole gradient on each device; so slices, gradients and state are constrained to be sharded as the parameters are.
On an explicit mesh the types say all this, and no constraint is added.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from adalomo_jax.jax_versions import explicit_mesh, is_explicit, on_mesh
from adalomo_jax.optimizers.kept import is_kept
from adalomo_jax.optimizers.per_layer import Group, PerLayer

Sharding = NamedSharding | None
"""How an array is sharded over an automatic mesh, one entry for each axis; None says nothing."""


def sharding_of(x: Any) -> Sharding:
    """The sharding of an array or a shape; None if that is on one device or an explicit mesh, or traced (unknown)."""
    sharding = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    if is_explicit(sharding.mesh):
        return None
    entries = (*sharding.spec, *(None,) * (len(x.shape) - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


def of_layer(sharding: Sharding, axis: int | None, *, keepdims: bool = False) -> Sharding:
    """The sharding of one layer, given the sharding and layer axis of its stack; an axis of None means no stack."""
    if sharding is None or axis is None:
        return sharding
    kept = (None,) if keepdims else ()
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:axis], *kept, *sharding.spec[axis + 1 :]))


def of_stack(sharding: Sharding) -> Sharding:
    """The sharding of a stack, along a new first axis, of arrays that have this sharding."""
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def of_own_state(optimizer: PerLayer, group: Group, of_tensors: Sequence[Sharding]) -> list[Sharding]:
    """The shardings of ``tx``'s state for one tensor of each leaf of a group, given those of all leaves' tensors.

    It asks ``tx`` about tensors on an explicit mesh, where types know their sharding: the means of rows are sharded as
    the rows are.
    """
    mesh = next((s.mesh for s in map(of_tensors.__getitem__, group.leaves) if s is not None), None)
    if mesh is None:
        return [None for _ in optimizer.owners(group)]
    explicit = explicit_mesh(mesh)

    def typed(i: int) -> jax.ShapeDtypeStruct:
        sharding, tensor = of_tensors[i], optimizer.tensors[i]
        spec = PartitionSpec() if sharding is None else sharding.spec
        return jax.ShapeDtypeStruct(tensor.shape, tensor.dtype, sharding=NamedSharding(explicit, spec))

    with on_mesh(explicit):
        own = jax.eval_shape(lambda tensors: optimizer.init_own(group, tensors), [typed(i) for i in group.leaves])
    return [NamedSharding(mesh, x.sharding.spec) for x in own]


def constrain(x: Any, sharding: Sharding) -> Any:
    """The weight, constrained to this sharding."""
    if sharding is None:
        return x
    return lax.with_sharding_constraint(x, x.spread(sharding) if is_kept(x) else sharding)
