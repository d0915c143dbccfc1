"""`FusedOptimizer`: like `nnx.Optimizer` in an NNX loop, with the backward pass and the update in one step."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import optax
from flax import nnx

from adalomo_jax.fused import Plan, StepResult, fuse
from adalomo_jax.fused.plan.origins import call_with_origins
from adalomo_jax.fused.plan.placed_tree import is_stacked
from adalomo_jax.nnx_graphs import (
    TAG,
    Others,
    check_not_written,
    check_params,
    check_same_params,
    completed,
    filled,
    leaf_shapes,
    loss_and_aux,
    merge,
    of_one_batch,
    split_call,
    split_graphs,
    unless_skipped,
    where_written,
)
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
        with nnx.update_context(TAG):
            params, args = split_call(model, batch, wrt)
            expected = leaf_shapes(params)
            if not expected:
                raise ValueError(f"wrt={wrt!r} selects nothing of the model, so nothing would be trained.")
            if options.get("microbatches") is not None and options.get("batch_argnums") is None:
                options["batch_argnums"] = tuple(range(1, 1 + len(batch)))
            skips = options.get("skip_nonfinite", True)

            def call(params: Any, others: Others, batch: Any) -> Any:
                check_params(expected, leaf_shapes(params))
                model, nodes = merge(others, params, inner=True)
                loss, aux = loss_and_aux(loss_fn(model, *filled(batch, nodes)), has_aux)
                written, left = split_graphs(model, nodes, wrt)
                check_same_params((params, *others.frozen), (written, *left.frozen))
                return written, left, loss, aux

            def functional_loss(params: Any, *args: Any) -> Any:
                *batch, others = args
                (written, left, loss, aux), origins = call_with_origins(call, params, others, batch)
                check_not_written(written, origins)
                left = left._replace(frozen=where_written(left.frozen, origins, len(expected)))
                return loss, (unless_skipped(left, others, loss) if skips else left, aux)

            self.wrt = wrt
            self._microbatched = options.get("microbatches") is not None
            self._fused = fuse(functional_loss, tx, has_aux=True, roll=roll, **options)
            self._loss = jax.jit(self._fused.loss)
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

    @nnx.update_context(TAG)
    def step(self, model: Any, *batch: Any, **extra_args: Any) -> StepResult:
        """Updates model, arguments and this optimizer, and returns the step's ``loss``, ``aux`` and ``metrics``.

        In the result ``params`` and ``state`` are None: they are in the model and in the optimizer. Arguments by name
        go to ``tx.update``. With ``roll`` the step stacks the layers of the model that are not stacked yet.
        """
        stacking = self._stacking
        params, placed, args = self._split(model, batch)
        result = self._fused.jit(placed, nnx.as_pure(self.opt_state), *args, **extra_args)
        left, aux = result.aux
        left = completed(of_one_batch(left) if self._microbatched else left, args[-1])
        new = result.params if stacking is None else tree_in_model(result.params, stacking, jax.tree.structure(params))
        merge(left, new, inner=False)
        nnx.update(self.opt_state, nnx.state(result.state))
        if stacking is not None and is_traced(model, self.wrt):
            unstack_in(model, self.wrt)  # only arrays can go into a function under nnx.jit, and come out of it
        return result._replace(params=None, state=None, aux=aux)

    @nnx.update_context(TAG)
    def loss(self, model: Any, *batch: Any) -> jax.Array:
        """The loss of a batch, without a step: the model's weights, counters and keys stay as they are.

        Of weights that are kept in another form, such as `Int8`, one layer of a stack exists as floats at a time. With
        ``roll`` it stacks the layers of the model that are not stacked yet.
        """
        _, placed, args = self._split(model, batch)
        loss, _ = self._loss(placed, *args)
        if self._stacking is not None and is_traced(model, self.wrt):
            unstack_in(model, self.wrt)
        return loss

    def _split(self, model: Any, batch: Any) -> tuple[Any, Any, Any]:
        """The model's parameters, the tree of them that the step takes, and the step's other arguments."""
        if self._stacking is not None:
            check_params(dict(self._expected), leaf_shapes(shapes_of(nnx.as_pure(nnx.state(model, self.wrt)))))
            stack_in(model, self.wrt, self._stacking)
        params, args = split_call(model, batch, self.wrt)
        return params, params if self._stacking is None else placed_tree(params, self._stacking), args

    def unplace(self, model: Any) -> None:
        """Gives the model the weights of stacked layers, so that you can read it, save it, or pass it to ``nnx.jit``.

        The weights are copied one stack at a time, and the stacks go: there is one copy of the weights before and
        after, and for a moment a second copy of one stack. The same holds for the next `step`, which stacks them again.
        A model without stacks does not change.
        """
        unstack_in(model, self.wrt)

    @nnx.update_context(TAG)
    def plan(self, model: Any, *batch: Any) -> Plan:
        """Where each parameter is updated, as a value that prints as a table. Computes nothing."""
        params, args = split_call(model, batch, self.wrt)
        return self._fused.plan(self._shapes_placed(params), *args)

    @nnx.update_context(TAG)
    def lower(self, model: Any, *batch: Any, **extra_args: Any) -> Any:
        """The step, lowered: ``optimizer.lower(model, *batch).compile().memory_analysis()`` says its memory."""
        params, args = split_call(model, batch, self.wrt)
        return self._fused.jit.lower(self._shapes_placed(params), nnx.as_pure(self.opt_state), *args, **extra_args)

    def _shapes_placed(self, params: Any) -> Any:
        return params if self._stacking is None else placed_shapes(params, self._stacking)
