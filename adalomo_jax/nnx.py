"""`FusedOptimizer`: like `nnx.Optimizer` in an NNX loop, with the backward pass and the update in one step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from adalomo_jax.fused import Plan, StepResult, fuse
from adalomo_jax.fused.plan.contents import has_programs
from adalomo_jax.fused.plan.jaxpr import Equation
from adalomo_jax.fused.plan.origins import Origin, call_with_origins
from adalomo_jax.fused.plan.paths import leaves_with_paths, path_name
from adalomo_jax.fused.plan.placed_tree import is_stacked
from adalomo_jax.nnx_stacks import (
    is_traced,
    placed_shapes,
    placed_tree,
    shapes_of,
    stack_in,
    stacking_of,
    tree_in_model,
    unstack_in,
)
from adalomo_jax.optimizers.kept import is_kept

_TAG = "adalomo_jax.FusedOptimizer"


class FusedOptimizer(nnx.Pytree):
    """An optimizer that takes the loss instead of gradients, and updates a model's parameters in place.

    ``result = optimizer.step(model, *batch)`` equals, up to rounding and as :func:`adalomo_jax.fuse` explains::

        loss, grads = nnx.value_and_grad(loss_fn)(model, *batch)
        nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, grads)

    under ``nnx.jit``, without the gradients and without a second copy of the weights: the arrays of the parameters and
    of the optimizer's state are donated, and the Variables of both hold the updated arrays. The old arrays are gone,
    wherever else they were kept.

    The step trains the Variables of the model that ``wrt`` selects. A shared Variable, even one that an argument
    shares, is one parameter. Other ``nnx.Param``, of the model and of arguments, are frozen: no gradient, no copy. All
    else that the loss changes stays as the loss left it, as under ``nnx.jit``, in the model and in the graph nodes
    among the arguments (``Rngs``, a metric, a teacher; alone or in dicts and tuples): ``BatchStat``, counters of
    ``Rngs``, ``Cache``, and attributes that are not arrays. But floats stay as they were if the loss is not finite
    (``skip_nonfinite=False`` writes them too). ``microbatches`` slice the arrays among the arguments, not the nodes:
    each microbatch starts from the same state, and so with the same dropout masks. Afterwards each float is the mean
    over the microbatches, and everything else is as the last microbatch left it.

    `step` compiles once for each structure of the model and the arguments: ``model.eval()`` makes another structure,
    ``model.train()`` the first again. Attributes that are not arrays are compared by ``==``, as by ``nnx.jit``, and
    need no hash. Give a model a new config instead of changing its config in place, because a changed one still equals
    itself. Under your own ``nnx.jit`` the step is part of that program; there, donate model and optimizer yourself. A
    Variable that the loss makes must exist already when you make the optimizer.

    **Layers in a Python list** are unrolled in the program, and each is updated whole, one after another. With
    ``roll=True`` the step stacks those that repeat and scans over them, with the memory and the compile time of a model
    that was written with ``nnx.scan``. Between the steps the model then holds stacks in place of its layers' arrays.
    Reading such a layer, in ``model(x)``, under ``nnx.jit`` or to save it, raises an error that says so; it never gives
    an old value. `unplace` gives the model its arrays back, for any use, and the next step stacks them again::

        for i, x in enumerate(batches):
            optimizer.step(model, x)
            if i % 100 == 0:
                optimizer.unplace(model)
                evaluate(model)
        optimizer.unplace(model)

    `step` stacks what the Variables hold when you call it, including weights that you loaded or changed meanwhile. At
    all times there is one copy of the weights. The first step, `unplace`, and the step after it copy them one stack at
    a time, so they also need the memory of the largest stack. A layer stays by itself if ``tx`` or ``wrt`` treats it
    differently, or if the loss also reads it elsewhere; a model without repeated layers stays as it is. `plan` says
    which. Other arrays of the layers, such as running means, are stacked within the step. If that costs more than it
    saves, as with frozen weights, layers are not stacked: freeze by ``trainable`` in place of ``wrt``, and frozen
    weights are kept in stacks, too. Under your own ``nnx.jit`` arrays go in and come out, and the stacks are a second
    copy of the weights.

    To resume, make model and optimizer, and give each its saved ``nnx.state`` by ``nnx.update``. All state exists
    before the first step, which is why the constructor takes a batch. With ``roll``, save after `unplace`, and resume
    with ``roll``: the optimizer's state for a stack has a leading layer axis.

    Args:
      model: a Module, or an abstract one by ``nnx.eval_shape``.
      tx: a transformation that treats leaves separately, see :func:`adalomo_jax.fuse`.
      loss_fn: ``loss_fn(model, *batch)``, as for ``nnx.value_and_grad``, returns a scalar, or ``(scalar, aux)`` with
        ``has_aux``.
      *batch: arguments as `step` will get them, or ``jax.ShapeDtypeStruct``s of them: the loss is traced, not run.
      wrt: an NNX filter that selects the Variables to train.
      has_aux: whether ``loss_fn`` returns something besides the loss.
      roll: whether to keep repeated layers of a Python list stacked between the steps: True, or from how many layers
        on, as in :func:`adalomo_jax.fuse`.
      extra_args: arguments that `step` will get by name, if ``tx.update`` requires them: with ``roll``, the constructor
        calls it.
      **options: the options of :func:`adalomo_jax.fuse`.

    Raises:
      ValueError: while tracing, if the model has other parameters than at construction, if the loss is not a scalar,
        writes a trained parameter or makes a new one, and as :func:`adalomo_jax.fuse` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from adalomo_jax import adalomo
      >>> from adalomo_jax.nnx import FusedOptimizer
      >>> model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
      >>> loss_fn = lambda model, x: jnp.mean(jnp.square(model(x)))
      >>> optimizer = FusedOptimizer(model, adalomo(1e-2), loss_fn, x)
      >>> first = optimizer.step(model, x)
      >>> second = optimizer.step(model, x)
      >>> bool(second.loss < first.loss), int(optimizer.count)
      (True, 2)
    """

    def __init__(
        self,
        model: Any,
        tx: optax.GradientTransformation,
        loss_fn: Callable[..., Any],
        *batch: Any,
        wrt: Any = nnx.Param,
        has_aux: bool = False,
        roll: bool | int = False,
        extra_args: Mapping[str, Any] = MappingProxyType({}),
        **options: Any,
    ):
        with nnx.update_context(_TAG):
            params, args = _split(model, batch, wrt)
            expected = _shapes(params)
            if not expected:
                raise ValueError(f"wrt={wrt!r} selects nothing of the model, so nothing would be trained.")
            if options.get("microbatches") is not None and options.get("batch_argnums") is None:
                options["batch_argnums"] = tuple(range(1, 1 + len(batch)))
            skips = options.get("skip_nonfinite", True)

            def call(params: Any, others: _Others, batch: Any) -> Any:
                _check_params(expected, _shapes(params))
                model, nodes = _merge(others, params, inner=True)
                loss, aux = _loss_and_aux(loss_fn(model, *_filled(batch, nodes)), has_aux)
                written, left = _split_graphs(model, nodes, wrt)
                _check_same_params((params, *others.frozen), (written, *left.frozen))
                return written, left, loss, aux

            def functional_loss(params: Any, *args: Any) -> Any:
                *batch, others = args
                (written, left, loss, aux), origins = call_with_origins(call, params, others, batch)
                _check_not_written(written, origins)
                left = left._replace(frozen=_where_written(left.frozen, origins, len(expected)))
                return loss, (_unless_skipped(left, others, loss) if skips else left, aux)

            self.wrt = wrt
            self._microbatched = options.get("microbatches") is not None
            self._fused = fuse(functional_loss, tx, has_aux=True, roll=roll, **options)
            self._expected = tuple(expected.items())
            # It places shapes: the model stays as it is.
            if roll and any(map(is_kept, jax.tree.leaves(params, is_leaf=is_kept))):
                raise ValueError(
                    "roll=True keeps layers of a list as stacks of arrays, but the model has weights in another form, "
                    "such as Int8. Leave roll out, or stack the layers with nnx.vmap before you encode them."
                )
            placed = self._fused.place(shapes_of(params), *args, **extra_args) if roll else params
            self._stacking = stacking_of(placed) if is_stacked(placed) else None
            self.opt_state = nnx.data(jax.tree.map(nnx.OptState, self._fused.init(placed, *args)))

    @property
    def count(self) -> jax.Array:
        """Steps taken, int32. (`nnx.Optimizer` calls this ``optimizer.step``, which here is the step itself.)"""
        return nnx.as_pure(self.opt_state).count

    @nnx.update_context(_TAG)
    def step(self, model: Any, *batch: Any, **extra_args: Any) -> StepResult:
        """Updates model, arguments and this optimizer, and returns the step's ``loss``, ``aux`` and ``metrics``.

        In the result ``params`` and ``state`` are None: they are in the model and in the optimizer. Arguments by name
        go to ``tx.update``. With ``roll`` the step stacks the layers of the model that are not stacked yet.
        """
        stacking = self._stacking
        if stacking is not None:
            _check_params(dict(self._expected), _shapes(shapes_of(nnx.as_pure(nnx.state(model, self.wrt)))))
            stack_in(model, self.wrt, stacking)
        params, args = _split(model, batch, self.wrt)
        placed = params if stacking is None else placed_tree(params, stacking)
        result = self._fused.jit(placed, nnx.as_pure(self.opt_state), *args, **extra_args)
        left, aux = result.aux
        left = _over(_of_one_batch(left) if self._microbatched else left, args[-1])
        new = result.params if stacking is None else tree_in_model(result.params, stacking, jax.tree.structure(params))
        _merge(left, new, inner=False)
        nnx.update(self.opt_state, nnx.state(result.state))
        if stacking is not None and is_traced(model, self.wrt):
            unstack_in(model, self.wrt)  # only arrays can go into a function under nnx.jit, and come out of it
        return result._replace(params=None, state=None, aux=aux)

    def unplace(self, model: Any) -> None:
        """Gives the model the weights of stacked layers, so that you can read it, save it, or pass it to ``nnx.jit``.

        The weights are copied one stack at a time, and the stacks go: there is one copy of the weights before and
        after, and for a moment a second copy of one stack. The same holds for the next `step`, which stacks them again.
        A model without stacks does not change.
        """
        unstack_in(model, self.wrt)

    @nnx.update_context(_TAG)
    def plan(self, model: Any, *batch: Any) -> Plan:
        """Where each parameter is updated, as a value that prints as a table. Computes nothing."""
        params, args = _split(model, batch, self.wrt)
        return self._fused.plan(self._shapes_placed(params), *args)

    @nnx.update_context(_TAG)
    def lower(self, model: Any, *batch: Any, **extra_args: Any) -> Any:
        """The step, lowered: ``optimizer.lower(model, *batch).compile().memory_analysis()`` says its memory."""
        params, args = _split(model, batch, self.wrt)
        return self._fused.jit.lower(self._shapes_placed(params), nnx.as_pure(self.opt_state), *args, **extra_args)

    def _shapes_placed(self, params: Any) -> Any:
        return params if self._stacking is None else placed_shapes(params, self._stacking)


class _Others(NamedTuple):
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


def _split(model: Any, batch: Sequence[Any], wrt: Any) -> tuple[Any, tuple[Any, ...]]:
    """The parameters that are trained, and the other arguments of the functional loss: the batch, and `_Others`."""
    leaves, treedef = jax.tree.flatten(tuple(batch), is_leaf=nnx.graph.is_graph_node)
    nodes: list[Any] = []
    for i, x in enumerate(leaves):
        if nnx.graph.is_graph_node(x):
            leaves[i] = _Node(len(nodes))
            nodes.append(x)
    params, others = _split_graphs(model, nodes, wrt)
    return params, (*treedef.unflatten(leaves), others)


def _filled(batch: Any, nodes: Sequence[Any]) -> Any:
    """The batch, with its nodes put back."""
    is_node = lambda x: isinstance(x, _Node)
    return jax.tree.map(lambda x: nodes[x.position] if is_node(x) else x, batch, is_leaf=is_node)


def _split_graphs(model: Any, nodes: list[Any], wrt: Any) -> tuple[Any, _Others]:
    """The model and the nodes as arrays. Both are one graph: a Variable that they share is the model's."""
    with nnx.split_context(_TAG) as context:
        graph, *of_model = context.split(model, wrt, nnx.Param, ...)
        nodes_graph, *of_nodes = context.split(nodes, nnx.Param, ...)
    params, frozen, state = map(nnx.as_pure, of_model)
    nodes_frozen, nodes_state = map(nnx.as_pure, of_nodes)
    return params, _Others((graph, nodes_graph), (frozen, nodes_frozen), (state, nodes_state))


def _merge(others: _Others, params: Any, *, inner: bool) -> tuple[Any, list[Any]]:
    """The model and the nodes: new ones in the loss (``inner``); after the step, the split ones, updated."""
    graphs, frozen, state = others
    with nnx.merge_context(_TAG, inner) as context:
        model = context.merge(graphs[0], params, frozen[0], state[0])
        return model, context.merge(graphs[1], frozen[1], state[1])


def _over(left: _Others, before: _Others) -> _Others:
    """What the loss left, completed by the parameters that it did not change."""
    choose = lambda new, old: old if new is None else new
    return left._replace(frozen=jax.tree.map(choose, left.frozen, before.frozen, is_leaf=lambda x: x is None))


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves_with_paths(params)}


def _check_params(expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]]) -> None:
    for path in [*expected, *actual]:
        if actual.get(path) != expected.get(path):
            was, now = (f"of the shape {s[path]}" if path in s else "not there" for s in (expected, actual))
            raise ValueError(
                f"A FusedOptimizer holds the state of the model that it was made for, in which the parameter {path!r} "
                f"was {was}; in this one it is {now}. Make a FusedOptimizer for this model."
            )


def _check_same_params(before: Sequence[Any], after: Sequence[Any]) -> None:
    for was, now in zip(map(_shapes, before), map(_shapes, after), strict=True):
        for path in was.keys() ^ now.keys():
            raise ValueError(
                f"The loss must not add or remove parameters, but it {'makes' if path in now else 'removes'} "
                f"{path!r}. Do so before the FusedOptimizer is made."
            )


def _check_not_written(params: Any, origins: Sequence[Origin]) -> None:
    for i, ((path, _), origin) in enumerate(zip(leaves_with_paths(params), origins)):
        if origin == i or (isinstance(origin, Equation) and has_programs(origin)):
            continue  # The result of a cond, a while_loop or a custom_vjp is taken to be the parameter itself.
        raise ValueError(
            f"The loss writes the parameter {path_name(path)!r}, as nnx.WeightNorm does. A FusedOptimizer would train "
            "its old value, nnx.Optimizer the written one. Write it between the steps, or leave it out of wrt."
        )


def _where_written(frozen: Any, origins: Sequence[Origin], first: int) -> Any:
    """The frozen parameters, which are inputs of the loss from ``first`` on; None for one that it did not change."""
    leaves, treedef = jax.tree.flatten(frozen)
    return treedef.unflatten([None if origins[i] == i else x for i, x in enumerate(leaves, first)])


def _loss_and_aux(result: Any, has_aux: bool) -> tuple[Any, Any]:
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


def _unless_skipped(left: Any, before: Any, loss: jax.Array) -> Any:
    """What the loss left, but with the floats as they were before if the loss is not finite."""
    old = dict(leaves_with_paths(before))
    is_finite = jnp.all(jnp.isfinite(loss))
    is_kept = lambda path, x: _is_float(x) and path in old and jnp.shape(old[path]) == jnp.shape(x)
    choose = lambda path, x: jnp.where(is_finite, x, old[path]) if is_kept(path, x) else x
    return jax.tree_util.tree_map_with_path(choose, left)


def _of_one_batch(left: Any) -> Any:
    """What the whole batch left, given what each microbatch left, along the first axis."""
    return jax.tree.map(lambda x: jnp.mean(x, 0) if _is_float(x) else x[-1], left)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)
