"""`fuse`: a loss and an optimizer, made into a training step in which the model's gradients never exist."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adalomo_jax.fused import backward
from adalomo_jax.fused.jaxpr import trace
from adalomo_jax.fused.leafwise import check_leafwise
from adalomo_jax.fused.plan import Plan, make_plan
from adalomo_jax.optimizers.per_layer import PerLayer
from adalomo_jax.optimizers.rounding import rounds_stochastically


class FusedState(NamedTuple):
    """The state of a training step."""

    count: jax.Array
    """Steps taken, int32; the keys of stochastic rounding are made from it."""
    inner: Any
    """The state of ``tx``, with a leading layer axis on what it keeps for a stack of layers."""


class StepResult(NamedTuple):
    """What a training step returns."""

    params: Any
    """The updated parameters."""
    state: FusedState
    """The updated state."""
    loss: jax.Array
    """The loss before the update."""
    aux: Any
    """What ``loss_fn`` returned beside the loss; None without ``has_aux``."""
    metrics: dict[str, jax.Array]
    """``grad_norm``: the norm of the whole gradient, float32."""


class _Traced(NamedTuple):
    """What is known of a call once the loss has been traced."""

    plan: Plan
    optimizer: PerLayer
    leaves: list[Any]
    treedef: Any
    result_treedef: Any


@dataclass(frozen=True, eq=False)
class FusedStep:
    """A training step, made by :func:`fuse`."""

    loss_fn: Callable[..., Any]
    tx: optax.GradientTransformationExtraArgs
    has_aux: bool
    stochastic_rounding: bool | None
    seed: int

    def init(self, params: Any, *args: Any) -> FusedState:
        """The state to begin with. Arguments of the loss, and parameters, may be ``jax.ShapeDtypeStruct``s."""
        traced = self._trace(params, args)
        return FusedState(jnp.zeros([], jnp.int32), traced.optimizer.init(traced.leaves))

    def plan(self, params: Any, *args: Any) -> Plan:
        """Where each parameter is updated, as a value that prints as a table. Computes nothing."""
        return self._trace(params, args).plan

    def __call__(self, params: Any, state: FusedState, *args: Any) -> StepResult:
        """One step: the loss, and the parameters and state after it. Pure: run it under ``jax.jit``, or call `jit`."""
        traced = self._trace(params, args)
        updater = self._updater(traced, state)
        done = backward.run(traced.plan, updater, state.inner, traced.leaves, jax.tree.leaves(args))
        result = traced.result_treedef.unflatten(done.outputs)
        return self._result(result, traced.treedef.unflatten(done.leaves), state, done.inner, done.squares)

    @cached_property
    def jit(self) -> Any:
        """This step under ``jax.jit``, with parameters and state donated: they are updated in place."""
        return jax.jit(self.__call__, donate_argnums=(0, 1))

    def unfused(self, params: Any, state: FusedState, *args: Any) -> StepResult:
        """The same step by ``jax.value_and_grad``, with all gradients at once: what the fused one must equal."""
        traced = self._trace(params, args)
        updater = self._updater(traced, state)
        result, gradients = jax.value_and_grad(self.loss_fn, has_aux=self.has_aux)(params, *args)
        gradients = jax.tree.leaves(gradients)
        leaves, inner = updater.update_all(state.inner, traced.leaves, gradients)
        return self._result(result, traced.treedef.unflatten(leaves), state, inner, backward.sum_of_squares(gradients))

    def _trace(self, params: Any, args: Sequence[Any]) -> _Traced:
        """Traces and plans the loss, and lifts ``tx`` to the plan."""
        paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths_and_leaves]
        leaves = [leaf for _, leaf in paths_and_leaves]
        _check_trainable(paths, leaves)
        program, result_treedef = trace(lambda leaves, *a: self.loss_fn(treedef.unflatten(leaves), *a), leaves, *args)
        _check_loss([program.avals[v] for v in program.outputs], result_treedef, self.has_aux)
        plan = make_plan(program, paths)
        tensors = tuple(
            jax.ShapeDtypeStruct(leaf.shape if leaf.layers is None else leaf.shape[1:], leaf.dtype)
            for leaf in plan.leaves
        )
        optimizer = PerLayer(self.tx, treedef, tensors, plan.groups)
        check_leafwise(optimizer, paths)
        return _Traced(plan, optimizer, leaves, treedef, result_treedef)

    def _updater(self, traced: _Traced, state: FusedState) -> backward.Updater:
        _check_state(state, jax.eval_shape(traced.optimizer.init, traced.leaves))
        rounded = [self.stochastic_rounding is not False and rounds_stochastically(x.dtype) for x in traced.leaves]
        if self.stochastic_rounding and not any(rounded):
            raise ValueError(
                "stochastic_rounding=True rounds bfloat16 and float16 parameters, and there are none among params. "
                "Leave it at None to round where there are such."
            )
        key = jax.random.fold_in(jax.random.key(self.seed, impl="rbg"), state.count)
        keys = [jax.random.fold_in(key, i) if is_rounded else None for i, is_rounded in enumerate(rounded)]
        return backward.Updater(traced.optimizer, traced.optimizer.shared(state.inner), tuple(keys))

    def _result(self, result: Any, params: Any, state: FusedState, inner: Any, squares: jax.Array) -> StepResult:
        loss, aux = result if self.has_aux else (result, None)
        state = FusedState(jnp.asarray(optax.safe_increment(state.count)), inner)
        return StepResult(params, state, loss, aux, {"grad_norm": jnp.sqrt(squares)})


def fuse(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    stochastic_rounding: bool | None = None,
    seed: int = 0,
) -> FusedStep:
    """Makes a training step that updates each layer while the gradients flow back, so that they never exist at once.

    ``fuse(loss_fn, tx)(params, state, *args)`` equals, up to rounding::

        loss, grads = jax.value_and_grad(loss_fn)(params, *args)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)

    with two differences. Parameters that a ``lax.scan`` runs over are many tensors, one for each layer: ``tx`` sees one
    layer at a time, and what it keeps for a stack has a leading layer axis. And bfloat16 and float16 parameters are
    rounded stochastically. `FusedStep.unfused` is that program, with the same state, to compare with.

    Args:
      loss_fn: ``loss_fn(params, *args)`` returns a scalar, or ``(scalar, aux)`` with ``has_aux``. Any JAX function.
      tx: a transformation that treats leaves separately: adalomo, lomo, optax.adamw, chains, schedules, masks. Not one
        that mixes them, such as ``optax.clip_by_global_norm``, or draws random numbers. Of a stack it sees a layer,
        with one axis less than the parameter: do not give it ``layer_axes``, and mind masks that go by rank.
      has_aux: whether ``loss_fn`` returns something beside the loss.
      stochastic_rounding: None rounds bfloat16 and float16 parameters stochastically and others to nearest; False
        rounds all to nearest; True is None, and an error where no parameter is of those types.
      seed: of the stochastic rounding. Keys are made from the seed, the step, the leaf and the layer, so a resumed run
        repeats the same bits.

    Returns:
      A :class:`FusedStep`: ``init``, ``jit`` (donates parameters and state), ``unfused``, ``plan``.

    Raises:
      ValueError: while tracing, for a loss that is no scalar, a parameter that has no gradient, a ``tx`` that mixes
        leaves, draws random numbers or has ``layer_axes``, or a state of other parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from adalomo_jax import adalomo, fuse
      >>> def loss_fn(params, x):
      ...     layer = jax.checkpoint(lambda x, w: (x + jnp.tanh(x @ w), None))
      ...     return jnp.mean(jax.lax.scan(layer, x, params["layers"])[0] @ params["head"])
      >>> params = {"layers": jnp.full((12, 4, 4), 0.1), "head": jnp.ones((4, 1))}
      >>> step = fuse(loss_fn, adalomo(1e-2))
      >>> x = jnp.ones((2, 4))
      >>> print(step.plan(params, x))
      parameter  shape   dtype    updated                 because
      head       4x1     float32  whole                   no scan reads it
      layers     12x4x4  float32  scan 0, layer by layer  a scan runs over its 12 layers
      >>> state = step.init(params, x)
      >>> losses = []
      >>> for _ in range(3):
      ...     params, state, loss, aux, metrics = step.jit(params, state, x)
      ...     losses.append(float(loss))
      >>> losses[0] > losses[1] > losses[2]
      True

    Source: the fused update is LOMO's, https://arxiv.org/abs/2306.09782, section 3.
    """
    return FusedStep(loss_fn, optax.with_extra_args_support(tx), has_aux, stochastic_rounding, seed)


def _check_trainable(paths: Sequence[str], leaves: Sequence[Any]) -> None:
    for path, leaf in zip(paths, leaves):
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            what = leaf.dtype if hasattr(leaf, "dtype") else f"the type {type(leaf).__name__}"
            raise ValueError(
                f"fuse trains every leaf of params, so each must be an array of floats, but {path!r} is of {what}. "
                "Pass what is not trained as another argument of the loss."
            )


def _check_loss(avals: Sequence[Any], result_treedef: Any, has_aux: bool) -> None:
    children = result_treedef.children()
    if has_aux and len(children) != 2:
        raise ValueError(f"With has_aux=True, loss_fn must return (loss, aux), but it returned {result_treedef}.")
    loss_treedef = children[0] if has_aux else result_treedef
    if loss_treedef != jax.tree.structure(0):
        raise ValueError(
            f"loss_fn must return one scalar, but it returned {result_treedef}. "
            "If it returns (loss, aux), say fuse(..., has_aux=True)."
        )
    if avals[0].shape != () or not jnp.issubdtype(avals[0].dtype, jnp.floating):
        raise ValueError(f"The loss must be a float scalar, but it is {avals[0].str_short()}. Take its mean or sum.")


def _check_state(state: FusedState, expected: Any) -> None:
    """Refuses a state that `init` did not make for such parameters."""
    way_out = "Make it with step.init(params, *args) for the parameters and the loss that the step is called with."
    if not isinstance(state, FusedState) or jax.tree.structure(state.inner) != jax.tree.structure(expected):
        raise ValueError(f"The state is not that of these parameters and this tx. {way_out}")
    for (path, leaf), want in zip(jax.tree_util.tree_leaves_with_path(state.inner), jax.tree.leaves(expected)):
        if jnp.shape(leaf) != want.shape:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"The state's {name} has the shape {jnp.shape(leaf)}, but {want.shape} is due. {way_out}")
