"""Everything that depends on JAX's version: the parts of jaxprs, and JAX's experimental features.

Between 0.10 and 0.12 the parameters of ``scan``, closed jaxprs, and the types within ``shard_map`` changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax import lax
from jax._src import source_info_util
from jax._src.core import AbstractValue
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, AxisType, Mesh, use_abstract_mesh

if TYPE_CHECKING:
    from jax.extend.core import JaxprEqn

CALLS = ("jit", "closed_call")
"""Primitives that only group equations."""
CHECKPOINT = "remat2"
"""The primitive of ``jax.checkpoint``."""
CUSTOM = ("custom_jvp_call", "custom_vjp_call")
"""Primitives with a custom derivative."""
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
"""Memory spaces."""


def is_jaxpr(value: Any) -> bool:
    """Whether a value is a jaxpr, open or closed."""
    return hasattr(value, "eqns") and hasattr(open_jaxpr(value), "invars")


def open_jaxpr(jaxpr: Any) -> Any:
    """The open jaxpr: up to JAX 0.11 a jaxpr with its constants wraps one without; later it is one itself."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def called(eqn: JaxprEqn) -> Any:
    """The jaxpr that an equation calls; None if it calls none, or several."""
    return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """The numbers of a scan's constants and carried values."""
    if "ft_in" in eqn.params:  # since JAX 0.12
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


def is_literal(atom: Any) -> bool:
    """Whether it is a ``jax.extend.core.Literal``. We do not import that module: it loads Pallas, which takes 20 ms."""
    return hasattr(atom, "val")


def is_reference(aval: Any) -> bool:
    """Whether a type is that of an array that is changed in place (``jax.new_ref``)."""
    return hasattr(aval, "inner_aval")


def context_of(eqn: JaxprEqn) -> str:
    """The settings around an equation: the precision of products, a mesh, where it computes."""
    context = eqn.ctx
    names = [name for name in getattr(type(context), "__slots__", None) or vars(context) if name[0] != "_"]
    return str([(name, getattr(context, name, None)) for name in sorted(names) if name != "manager"])


def has_effects(eqn: JaxprEqn) -> bool:
    """Whether an equation does more than compute results: it prints or calls back. Naming a mesh axis is no effect."""
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


def bind(eqn: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """The results of an equation on other operands, in its context and under its name."""
    params = eqn.primitive.get_bind_params(eqn.params)
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack), eqn.ctx.manager:
        results: Any = eqn.primitive.bind(*operands, **params)
    return results if eqn.primitive.multiple_results else [results]


def varying_axes(x: Any) -> frozenset[str]:
    """The axes of a ``shard_map``'s mesh along which an array or a type may differ; none with ``check_vma=False``."""
    aval: Any = x if isinstance(x, AbstractValue) else jax.typeof(x)
    return aval.mat.varying if hasattr(aval, "mat") else getattr(aval, "vma", frozenset())  # `vma` before JAX 0.10.2


def is_explicit(mesh: AbstractMesh | Mesh) -> bool:
    """Whether types say how arrays are sharded over a mesh."""
    return AxisType.Explicit in mesh.axis_types


def explicit_sharding(x: Any) -> Any:
    """How an array or a type is sharded, if its type says so; otherwise None."""
    aval: Any = x if isinstance(x, AbstractValue) else jax.typeof(x)
    return aval.sharding if is_explicit(aval.sharding.mesh) else None


def explicit_mesh(mesh: AbstractMesh | Mesh) -> AbstractMesh:
    """A mesh with the same axes on which types say how arrays are sharded; see `on_mesh`."""
    return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names))


on_mesh = use_abstract_mesh
"""The context in which such a mesh is in effect."""


def memory_space(x: Any) -> Any:
    """`HOST` or `DEVICE`: the memory that an array or a tracer is in."""
    return jax.typeof(x).memory_space


def with_axes_in_order(x: jax.Array) -> jax.Array:
    """The array itself, with its axes in order in memory."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def vary_along(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The array, with a type that may differ along these axes of a ``shard_map``'s mesh."""
    return lax.pcast(x, tuple(sorted(axes)), to="varying")
