"""How parameters are spread over a mesh of devices, and what is made of them spread alike.

On an automatic mesh XLA chooses how it spreads what it computes. Left alone, it may gather a whole stack of layers, or
sum a whole gradient on each device; so slices, gradients and state are constrained to be spread as parameters are.
On an explicit mesh types say all that, and nothing is added.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from adalomo_jax.jax_versions import explicit_mesh, is_explicit, on_mesh
from adalomo_jax.optimizers.per_layer import Group, PerLayer

Sharding = NamedSharding | None
"""Of an array how it is spread over an automatic mesh, an entry for each axis; None says nothing."""


def sharding_of(x: Any) -> Sharding:
    """Of an array or a shape; None where it is on one device or an explicit mesh, or traced, and that is not known."""
    sharding = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    if is_explicit(sharding.mesh):
        return None
    entries = (*sharding.spec, *(None,) * (len(x.shape) - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


def of_layer(sharding: Sharding, axis: int | None, *, keepdims: bool = False) -> Sharding:
    """Of one layer of a stack, given that of the stack and its layer axis; None is no stack."""
    if sharding is None or axis is None:
        return sharding
    kept = (None,) if keepdims else ()
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:axis], *kept, *sharding.spec[axis + 1 :]))


def of_stack(sharding: Sharding) -> Sharding:
    """Of arrays that are spread so, stacked along a new first axis."""
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def of_own_state(optimizer: PerLayer, group: Group, of_tensors: Sequence[Sharding]) -> list[Sharding]:
    """Of what ``tx`` keeps for one tensor of each leaf of a group, given those of the tensors of all leaves.

    Found by asking ``tx`` about tensors of an explicit mesh, on which types know how they are spread: a row's means are
    spread as rows are.
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
    """The array, spread so."""
    return x if sharding is None else lax.with_sharding_constraint(x, sharding)
