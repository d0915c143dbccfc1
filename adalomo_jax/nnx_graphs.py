"""An NNX model and a loss's arguments as arrays, and back; and what such a loss must not do to parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adalomo_jax.fused.plan.contents import has_programs
from adalomo_jax.fused.plan.jaxpr import Equation
from adalomo_jax.fused.plan.origins import Origin
from adalomo_jax.fused.plan.paths import leaves_with_paths, path_name

TAG = "adalomo_jax.FusedOptimizer"
"""The name of the contexts in which a graph is taken apart and put together."""


class Others(NamedTuple):
    """What the loss reads besides trained parameters and the batch's arrays: pairs, for the model and other nodes."""

    graphs: Any
    """The static part. It has no leaves, so a step is compiled for it, and it is compared by value."""
    frozen: Any
    """The parameters that are not trained. After the loss: None for those that it left as they were."""
    state: Any
    """All other arrays."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Node:
    """The place of a graph node among the arguments."""

    position: int


def split_call(model: Any, batch: Sequence[Any], wrt: Any) -> tuple[Any, tuple[Any, ...]]:
    """The parameters that are trained, and the other arguments of the functional loss: the batch, and `Others`."""
    leaves, treedef = jax.tree.flatten(tuple(batch), is_leaf=nnx.graph.is_graph_node)
    nodes: list[Any] = []
    for i, x in enumerate(leaves):
        if nnx.graph.is_graph_node(x):
            leaves[i] = _Node(len(nodes))
            nodes.append(x)
    params, others = split_graphs(model, nodes, wrt)
    return params, (*treedef.unflatten(leaves), others)


def filled(batch: Any, nodes: Sequence[Any]) -> Any:
    """The batch, with its nodes put back."""
    is_node = lambda x: isinstance(x, _Node)
    return jax.tree.map(lambda x: nodes[x.position] if is_node(x) else x, batch, is_leaf=is_node)


def split_graphs(model: Any, nodes: list[Any], wrt: Any) -> tuple[Any, Others]:
    """The model and the nodes as arrays. Both are one graph: a Variable that they share is the model's."""
    with nnx.split_context(TAG) as context:
        graph, *of_model = context.split(model, wrt, nnx.Param, ...)
        nodes_graph, *of_nodes = context.split(nodes, nnx.Param, ...)
    params, frozen, state = map(nnx.as_pure, of_model)
    nodes_frozen, nodes_state = map(nnx.as_pure, of_nodes)
    return params, Others((graph, nodes_graph), (frozen, nodes_frozen), (state, nodes_state))


def merge(others: Others, params: Any, *, inner: bool) -> tuple[Any, list[Any]]:
    """The model and the nodes: new ones in the loss (``inner``); after the step, the split ones, updated."""
    graphs, frozen, state = others
    with nnx.merge_context(TAG, inner) as context:
        model = context.merge(graphs[0], params, frozen[0], state[0])
        return model, context.merge(graphs[1], frozen[1], state[1])


def completed(left: Others, before: Others) -> Others:
    """What the loss left, completed by the parameters that it did not change."""
    choose = lambda new, old: old if new is None else new
    return left._replace(frozen=jax.tree.map(choose, left.frozen, before.frozen, is_leaf=lambda x: x is None))


def leaf_shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves_with_paths(params)}


def check_params(expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]]) -> None:
    for path in [*expected, *actual]:
        if actual.get(path) != expected.get(path):
            was, now = (f"of the shape {s[path]}" if path in s else "not there" for s in (expected, actual))
            raise ValueError(
                f"A FusedOptimizer holds the state of the model that it was made for, in which the parameter {path!r} "
                f"was {was}; in this one it is {now}. Make a FusedOptimizer for this model."
            )


def check_same_params(before: Sequence[Any], after: Sequence[Any]) -> None:
    for was, now in zip(map(leaf_shapes, before), map(leaf_shapes, after), strict=True):
        for path in was.keys() ^ now.keys():
            raise ValueError(
                f"The loss must not add or remove parameters, but it {'makes' if path in now else 'removes'} "
                f"{path!r}. Do so before the FusedOptimizer is made."
            )


def check_not_written(params: Any, origins: Sequence[Origin]) -> None:
    for i, ((path, _), origin) in enumerate(zip(leaves_with_paths(params), origins)):
        if origin == i or (isinstance(origin, Equation) and has_programs(origin)):
            continue  # The result of a cond, a while_loop or a custom_vjp is taken to be the parameter itself.
        raise ValueError(
            f"The loss writes the parameter {path_name(path)!r}, as nnx.WeightNorm does. A FusedOptimizer would train "
            "its old value, nnx.Optimizer the written one. Write it between the steps, or leave it out of wrt."
        )


def where_written(frozen: Any, origins: Sequence[Origin], first: int) -> Any:
    """The frozen parameters, which are inputs of the loss from ``first`` on; None for one that it did not change."""
    leaves, treedef = jax.tree.flatten(frozen)
    return treedef.unflatten([None if origins[i] == i else x for i, x in enumerate(leaves, first)])


def loss_and_aux(result: Any, has_aux: bool) -> tuple[Any, Any]:
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(
            f"With has_aux=True, loss_fn must return (loss, aux), but it returned {type(result).__name__}."
        )
    loss, aux = result if has_aux else (result, None)
    if jax.tree.structure(loss) != jax.tree.structure(0):
        raise ValueError(
            f"loss_fn must return one scalar, but it returned {jax.tree.structure(loss)}. "
            "If it returns (loss, aux), say FusedOptimizer(..., has_aux=True)."
        )
    return loss, aux


def unless_skipped(left: Any, before: Any, loss: jax.Array) -> Any:
    """What the loss left, but with the floats as they were before if the loss is not finite."""
    old = dict(leaves_with_paths(before))
    is_finite = jnp.all(jnp.isfinite(loss))
    is_kept = lambda path, x: _is_float(x) and path in old and jnp.shape(old[path]) == jnp.shape(x)
    choose = lambda path, x: jnp.where(is_finite, x, old[path]) if is_kept(path, x) else x
    return jax.tree_util.tree_map_with_path(choose, left)


def of_one_batch(left: Any) -> Any:
    """What the whole batch left, given what each microbatch left, along the first axis."""
    return jax.tree.map(lambda x: jnp.mean(x, 0) if _is_float(x) else x[-1], left)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)
