"""`fuse` makes a loss and an optimizer into a training step in which the model's gradients never all exist."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax

from adalomo_jax.fused.convert import state_of_layers, state_of_stacks
from adalomo_jax.fused.loss_scale import DynamicLossScale
from adalomo_jax.fused.offload import fetch, is_on_host, place, put_beside, shapes_on_device
from adalomo_jax.fused.options import Options, check_loss_and_tx
from adalomo_jax.fused.plan.checks import (
    check_by_position,
    check_extra_args,
    check_not_deleted,
    check_placed,
    check_state,
    warn_of_whole,
)
from adalomo_jax.fused.plan.placed_tree import is_stacked, layers_of, stack_layers, unstack_layers
from adalomo_jax.fused.plan.plan import Plan
from adalomo_jax.fused.plan.rolling import find_stacks
from adalomo_jax.fused.plan.selection import leaves_on_host
from adalomo_jax.fused.plan.tracing import Traced, trace_call
from adalomo_jax.fused.result import Donating, StepResult, by_path, check_call
from adalomo_jax.fused.run import passes
from adalomo_jax.fused.run.unfused import all_gradients
from adalomo_jax.fused.run.updater import Updater, any_written
from adalomo_jax.fused.sharding import constrain, of_own_state, sharding_of
from adalomo_jax.fused.state import FusedState, make_abstract_state, make_state
from adalomo_jax.optimizers.rounding import rounds_stochastically


@dataclass(frozen=True, eq=False)
class FusedStep:
    """A training step, made by :func:`fuse`."""

    loss_fn: Callable[..., Any]
    tx: optax.GradientTransformationExtraArgs
    options: Options

    def init(self, params: Any, *args: Any) -> FusedState:
        """The state before the first step: what ``tx.init`` makes of the trained parameters, and step counters.

        It traces the loss and refuses here whatever a step cannot do. It warns of each parameter that a scan runs over
        but that the step still has to update whole.

        Args:
          params: the loss's first argument, as the step gets it: after `place`, if you use that. Arrays or
            ``jax.ShapeDtypeStruct``s; the same holds for ``args``.
          args: the loss's other arguments, with the shapes and dtypes that the step will see.

        Returns:
          A :class:`FusedState`. Stacked layers have one state each, along the stack's layer axis.

        Raises:
          ValueError: ``params`` has leaves that are not arrays, no leaf is trained, or a trained leaf does not hold
            floats of at least 16 bits; the loss does not return one float scalar (and ``aux``, if ``has_aux``), or
            changes arrays in place; ``microbatches`` cannot slice ``args``; ``tx`` mixes leaves or the layers of a
            stack; ``strict`` does not hold. Each message names the leaf or argument, its value, and the way out.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> from adalomo_jax import adalomo, fuse
          >>> step = fuse(lambda params, x: jnp.mean((x @ params["w"]) ** 2), adalomo(1e-2))
          >>> params, x = {"w": jnp.ones((4, 2))}, jnp.ones((3, 4))
          >>> state = step.init(params, x)
          >>> params, state, loss, *_ = step.jit(params, state, x)
          >>> float(loss)
          16.0
        """
        traced = self._trace(params, args)
        warn_of_whole(traced.plan)
        return make_state(traced, self.options.loss_scale)

    def abstract_state(self, params: Any, *args: Any) -> FusedState:
        """What `init` would return, as ``jax.ShapeDtypeStruct``s with their shardings. Allocates nothing.

        Use it to compile a step for devices that you do not have, or to restore a checkpoint into.
        """
        return make_abstract_state(self._trace(params, args), self.options.loss_scale)

    def place(self, params: Any, *args: Any, **extra_args: Any) -> Any:
        """The parameters as a step wants them: layers of a list stacked, each in the memory that ``offload`` names.

        If three or more layers repeat in the loss, as in a Python loop over a list, the leaf of the first layer becomes
        the stack of all of them, and an :class:`InStack` takes the place of each of the others. The step scans over
        such a stack, so it needs the memory and the compile time of a model that was written with a scan. The loss
        still gets its own tree, and `unplace` gives it back; masks, ``trainable`` and metrics go by its paths. A layer
        stays by itself if it is trained differently, ``tx`` treats it differently, the loss also reads it elsewhere, or
        it computes something else. So do fewer than three layers that are alike. `plan` says which and why. Arrays are
        copied, one stack at a time; your own arrays stay. Arguments by name are those of ``tx.update``.

        With ``offload="params"`` the leaves that `Plan.stacks_of_matrices` names go to the host's memory (the memory
        kind ``"pinned_host"``), and all others to the devices' memory. Arrays that are already in their memory are
        returned as they are. A ``jax.ShapeDtypeStruct`` becomes a description of the placed array.

        Raises:
          ValueError: if there is no stack of matrices to move, if the backend has no such memory, or if an array to
            move lies on several devices without a ``jax.sharding.NamedSharding``.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> from adalomo_jax import adalomo, fuse
          >>> layer = jax.checkpoint(lambda x, w: (x + jnp.tanh(x @ w), None))
          >>> loss_fn = lambda params, x: jnp.mean(jax.lax.scan(layer, x, params)[0])
          >>> step = fuse(loss_fn, adalomo(1e-2), offload=("params", "activations"))
          >>> x = jnp.ones((2, 4))
          >>> params = step.place(jnp.full((12, 4, 4), 0.1), x)
          >>> result = step.jit(params, step.init(params, x), x)
          >>> print(result.params.sharding.memory_kind)
          pinned_host

          Layers in a list:

          >>> layer = jax.checkpoint(lambda x, w: x + jnp.tanh(x @ w))
          >>> def loss_fn(params, x):
          ...     for w in params["layers"]:
          ...         x = layer(x, w)
          ...     return jnp.mean(x)
          >>> step = fuse(loss_fn, adalomo(1e-2))
          >>> params = step.place({"layers": [jnp.full((4, 4), 0.1) for _ in range(12)]}, x)
          >>> print(step.plan(params, x))
          parameter  shape   dtype    updated                 because
          layers/0   12x4x4  float32  scan 0, layer by layer  a scan runs over its 12 layers, which a list had
          gradients alive at once: 64 of 768 bytes
          >>> params["layers"][2]
          InStack(stack="['layers'][0]", layer=2)
          >>> len(step.unplace(params)["layers"]), step.unplace(params)["layers"][2].shape
          (12, (4, 4))

          A mask that names one of them:

          >>> step = fuse(loss_fn, adalomo(1e-2), trainable=lambda path: path != "layers/3")
          >>> print(step.plan(step.place({"layers": [jnp.full((4, 4), 0.1) for _ in range(4)]}, x), x))
          parameter  shape  dtype    updated                 because
          layers/0   3x4x4  float32  scan 0, layer by layer  a scan runs over its 3 layers, which a list had
          layers/3   4x4    float32  not                     it is not trained, and layers/2 is
          gradients alive at once: 64 of 192 bytes
        """
        check_not_deleted(params, "params")
        if self.options.roll and not is_stacked(params):
            params = stack_layers(params, find_stacks(self.loss_fn, self.tx, self.options, params, args, extra_args))
        plan = self.plan(params, *args)
        on_host = leaves_on_host(plan, self.options)
        leaves, treedef = jax.tree.flatten(params)
        return treedef.unflatten([place(x, on_host=i in on_host) for i, x in enumerate(leaves)])

    def unplace(self, params: Any) -> Any:
        """The parameters as `place` was given them, bit for bit: the leaves are slices of stacks, on the device."""
        return unstack_layers(jax.tree.map(fetch, params))

    def place_state(self, state: FusedState, params: Any, *args: Any) -> FusedState:
        """The state for placed parameters, made from a state for unplaced ones: from a checkpoint without stacks.

        Args:
          state: the state for unplaced parameters.
          params: the parameters as `place` returns them, or ``jax.ShapeDtypeStruct``s of them.
          *args: the other arguments of the loss.
        """
        return state_of_stacks(state, *self._with_and_without_stacks(params, args), layers_of(params))

    def unplace_state(self, state: FusedState, params: Any, *args: Any) -> FusedState:
        """The state for unplaced parameters, made from a state for placed ones; the arguments are `place_state`'s."""
        return state_of_layers(state, *self._with_and_without_stacks(params, args), layers_of(params))

    def _with_and_without_stacks(self, params: Any, args: Sequence[Any]) -> tuple[Traced, Traced]:
        """A call with unplaced parameters, and one with placed ones."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)), params)
        return self._trace(unstack_layers(shapes), args), self._trace(params, args)

    def plan(self, params: Any, *args: Any) -> Plan:
        """Where each parameter is updated, as a value that prints as a table. Computes nothing."""
        return self._trace(params, args).plan

    def saved_bytes(self, params: Any, *args: Any) -> int:
        """Bytes that the forward pass saves for the backward pass: layer inputs and other residuals. Computes nothing.

        They do not include the parameters, which the step reads again, nor what the last stage before the loss holds.
        """
        traced = self._trace(params, args)
        return passes.saved_bytes(traced.plan, traced.leaves, traced.args, self.options.microbatches)

    def __call__(self, params: Any, state: FusedState, *args: Any, **extra_args: Any) -> StepResult:
        """One step: it equals `unfused`, up to rounding, with one layer's gradients alive at a time.

        It is pure. Run it under ``jax.jit`` with ``params`` and ``state`` donated, as `jit` does: only then are they
        updated in place.

        Args:
          params: the loss's first argument: a tree of arrays.
          state: what `init` or the last step returned for such parameters.
          args: the loss's other arguments, by position.
          extra_args: arguments of ``tx.update``, by name. It also gets the loss as ``value``, unless you give ``value``
            yourself (such as the loss on other data, for ``optax.contrib.reduce_on_plateau``).

        Returns:
          A :class:`StepResult`: parameters, state, the loss before the update, ``aux`` and metrics.

        Raises:
          ValueError: as `init` does; also if ``state`` was made for other parameters or arguments than these, or for
            parameters that were placed differently.
        """
        with jax.disable_jit(False):  # a loop that runs in Python would not keep the residuals of each iteration
            return self._run(params, state, args, extra_args)

    def _run(self, params: Any, state: FusedState, args: Sequence[Any], extra_args: Mapping[str, Any]) -> StepResult:
        traced = self._trace_step(params, state, args, extra_args)
        plan, options = traced.plan, self.options
        check_placed(plan, traced.leaves, options)
        if not (plan.updates_early or any(map(is_on_host, traced.leaves))):
            return self._run_unfused(traced, state, extra_args)
        updater = self._updater(traced, state)
        d_loss, offloads = self._d_loss(state), options.offloads_activations
        ran = passes.forward(plan, traced.leaves, traced.args, options.microbatches, d_loss, offloads)
        result = self._result_of(traced, ran.outputs)
        measure = lambda: passes.norm_of_gradient(plan, ran, updater)
        looks_ahead, norm = self._looks_ahead(state), None
        if looks_ahead is not False:
            norm = measure() if looks_ahead is True else lax.cond(looks_ahead, measure, lambda: jnp.float32(0))
            ran = passes.begin_after(ran, norm)
        updater = self._decide(updater, result, norm, extra_args)
        done = passes.backward(plan, ran, updater, state.inner, traced.leaves)
        return self._finish(traced, state, result, done, norm)

    @cached_property
    def jit(self) -> Donating:
        """This step under ``jax.jit``, with parameters and state donated, so that they are updated in place."""
        return Donating(jax.jit(self.__call__, donate_argnums=(0, 1)))

    def unfused(self, params: Any, state: FusedState, *args: Any, **extra_args: Any) -> StepResult:
        """The same step by ``jax.vjp``, with all gradients at once. The fused step must equal it."""
        traced = self._trace_step(params, state, args, extra_args, fetch)
        result = self._run_unfused(traced, state, extra_args)
        return result._replace(params=jax.tree.map(put_beside, result.params, params))

    def _run_unfused(self, traced: Traced, state: FusedState, extra_args: Mapping[str, Any]) -> StepResult:
        """The step by ``jax.vjp`` of the whole loss."""
        outputs, gradients = all_gradients(self.loss_fn, traced, self.options.microbatches, self._d_loss(state))
        result, updater = self._result_of(traced, outputs), self._updater(traced, state)
        looks_ahead, norm = self._looks_ahead(state), None
        if looks_ahead is not False:
            norm = jnp.where(looks_ahead, updater.measure(None, list(gradients.values())).squares.norm(), 0)
        updater = self._decide(updater, result, norm, extra_args)
        leaves, inner, statistics = updater.update_all(state.inner, traced.leaves, gradients)
        return self._finish(traced, state, result, passes.Pass(leaves, inner, statistics), norm)

    def _trace(self, params: Any, args: Sequence[Any]) -> Traced:
        """The call, traced."""
        check_not_deleted(params, "params")
        return trace_call(self.loss_fn, self.tx, self.options, params, args)

    def _trace_step(
        self,
        params: Any,
        state: FusedState,
        args: Sequence[Any],
        extra_args: Mapping[str, Any],
        move: Callable[[Any], Any] = lambda x: x,
    ) -> Traced:
        """The call, traced, after ``move`` has moved the parameters; the state must be one for such a call."""
        check_call(params, state, args)
        check_extra_args(extra_args)
        check_by_position(self.loss_fn, args, extra_args)
        params = jax.tree.map(move, params)
        return trace_call(self.loss_fn, self.tx, self.options, params, args, state.signature, extra_args)

    def _d_loss(self, state: FusedState) -> jax.Array:
        """The cotangent of each microbatch's loss."""
        scale = self._scale(state)
        d = jnp.ones([], jnp.float32) if scale is None else jnp.asarray(scale, jnp.float32)
        return d / self.options.microbatches if self.options.microbatches and self.options.reduction == "mean" else d

    def _scale(self, state: FusedState) -> Any:
        scale = self.options.loss_scale
        return state.loss_scale.scale if isinstance(scale, DynamicLossScale) else scale

    def _result_of(self, traced: Traced, outputs: Sequence[Any]) -> tuple[jax.Array, Any]:
        """The loss and aux."""
        loss, *aux = outputs
        if self.options.microbatches is not None:
            loss = jnp.mean(loss) if self.options.reduction == "mean" else jnp.sum(loss)
        result = traced.result_treedef.unflatten([loss, *aux])
        return result if self.options.has_aux else (result, None)

    def _updater(self, traced: Traced, state: FusedState) -> Updater:
        """The updater, without what depends on the loss."""
        check_state(
            state.inner,
            jax.eval_shape(lambda leaves: traced.optimizer.init(leaves, traced.axes), shapes_on_device(traced.leaves)),
        )
        rounding = self.options.stochastic_rounding
        plans = traced.plan.leaves
        rounded = [rounding is not False and p.trained and rounds_stochastically(p.dtype) for p in plans]
        if rounding and not any(rounded):
            raise ValueError(
                "stochastic_rounding=True rounds bfloat16 and float16 parameters, and there are none among those that "
                "are trained. Leave it at None to round only parameters of these dtypes."
            )
        key = jax.random.fold_in(jax.random.key(self.options.seed), state.count)
        # All keys at once: each one alone would give the compiler some 150 scalar instructions.
        folded = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(rounded)))
        keys = [folded[i] if is_rounded else None for i, is_rounded in enumerate(rounded)]
        scale, of_tensors = self._scale(state), tuple(leaf.tensor_sharding for leaf in plans)
        return Updater(
            optimizer=traced.optimizer,
            axes=traced.axes,
            shared=traced.optimizer.shared(state.inner),
            keys=tuple(keys),
            unscale=None if scale is None else 1 / jnp.asarray(scale, jnp.float32),
            measures_rms=self.options.rms_metrics,
            of_tensors=of_tensors,
            of_own={group: of_own_state(traced.optimizer, group, of_tensors) for group in traced.optimizer.groups},
        )

    def _looks_ahead(self, state: FusedState) -> bool | jax.Array:
        """Whether the step takes the norm of all gradients, in a backward pass of its own, before it writes anything.

        It does so to clip them, and if a dynamic loss scale has just changed, because the scale may be too large: a
        step in which gradients overflow is then skipped as a whole, and the step counters do not count it.
        """
        if isinstance(self.options.loss_scale, DynamicLossScale) and self.options.max_grad_norm is None:
            return state.loss_scale.finite_steps == 0
        return self.options.max_grad_norm is not None

    def _decide(
        self,
        updater: Updater,
        result: tuple[jax.Array, Any],
        norm: jax.Array | None,
        extra_args: Mapping[str, Any],
    ) -> Updater:
        """The updater that knows the loss, and the norm if that is computed first."""
        clip, proceed, loss = None, None, result[0]
        if self.options.skip_nonfinite:
            proceed = jnp.isfinite(loss) if norm is None else jnp.isfinite(loss) & jnp.isfinite(norm)
        if norm is not None and self.options.max_grad_norm is not None:
            most = jnp.float32(self.options.max_grad_norm)
            clip = jnp.where(norm < most, 1.0, most / norm)
        return replace(updater, clip=clip, proceed=proceed, extra_args={"value": loss, **extra_args})

    def _finish(
        self,
        traced: Traced,
        state: FusedState,
        result: tuple[jax.Array, Any],
        done: passes.Pass,
        norm: jax.Array | None,
    ) -> StepResult:
        """The result, with the state's counters and the metrics."""
        loss, aux = result
        if norm is None or self.options.max_grad_norm is None:  # it was not computed, or not in every step
            norm = passes.norm_in(done.statistics)
        unwritten = sum((jnp.sum(~s.written) for s in done.statistics.values()), start=jnp.zeros([], jnp.int32))
        wrote = any_written(done.statistics)
        metrics: dict[str, Any] = {
            "loss": loss,
            "grad_norm": norm,
            "skipped": ~wrote,
            "unwritten": unwritten,
        }
        loss_scale = state.loss_scale
        if isinstance(self.options.loss_scale, DynamicLossScale):
            metrics["loss_scale"] = loss_scale.scale
            loss_scale = self.options.loss_scale.update(loss_scale, jnp.isfinite(loss) & jnp.isfinite(norm))
        if self.options.rms_metrics:
            for name in ("update_rms", "param_rms"):
                metrics[name] = by_path(traced.plan, {g: getattr(s, name) for g, s in done.statistics.items()})
        state = FusedState(
            count=jnp.where(wrote, optax.safe_increment(state.count), state.count),
            skipped=jnp.where(unwritten > 0, optax.safe_increment(state.skipped), state.skipped),
            inner=done.inner,
            loss_scale=loss_scale,
            signature=state.signature,
        )
        leaves = [constrain(x, leaf.sharding) for x, leaf in zip(done.leaves, traced.plan.leaves, strict=True)]
        return StepResult(traced.treedef.unflatten(leaves), state, loss, aux, metrics)


def fuse(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    trainable: Any | Callable[[str], bool] = None,
    max_grad_norm: float | None = None,
    microbatches: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    batch_argnums: int | tuple[int, ...] | None = None,
    loss_scale: float | DynamicLossScale | None = None,
    skip_nonfinite: bool = True,
    rms_metrics: bool = False,
    strict: bool = False,
    stochastic_rounding: bool | None = None,
    seed: int = 0,
    offload: Literal["params", "activations"] | tuple[str, ...] | None = None,
    roll: bool | int = True,
) -> FusedStep:
    """Makes a training step that updates each layer while gradients flow back, so they never all exist at once.

    ``fuse(loss_fn, tx)(params, state, *args, **extra_args)`` equals, up to rounding::

        loss, grads = jax.value_and_grad(loss_fn)(params, *args)
        updates, state = tx.update(grads, state, params, **{"value": loss, **extra_args})
        params = optax.apply_updates(params, updates)

    with three differences. A parameter that a ``lax.scan`` runs over counts as many tensors, one for each layer: ``tx``
    sees one layer at a time, and its state for a stack has a leading layer axis. bfloat16 and float16 parameters are
    rounded stochastically. Anything that is not finite is not written. `FusedStep.unfused` is that program, with the
    same state and options, for comparison.

    Args:
      loss_fn: ``loss_fn(params, *args)`` returns a scalar, or ``(scalar, aux)`` with ``has_aux``. Any JAX function.
      tx: a transformation that treats leaves separately: adalomo, lomo, optax.adamw, chains, schedules, masks. It must
        not mix them, as ``optax.clip_by_global_norm`` does, or draw random numbers. ``tx.update`` gets the loss as
        ``value`` (with microbatches, the loss of the batch) and whatever the step gets by name. It sees one layer of a
        stack, with one axis less than the parameter: do not give it ``layer_axes``, and mind masks that go by rank.
      has_aux: whether ``loss_fn`` returns something besides the loss.
      trainable: the parameters to train: a tree of bools like ``params``, a prefix of one, or a function of a path such
        as ``"layers/attention/query"``. The others cost no gradient, no state and no write, and ``tx`` does not see
        them. None trains all floats; integers and bools are left alone.
      max_grad_norm: equals ``optax.clip_by_global_norm`` before ``tx``. It takes a second backward pass, over the same
        saved forward pass.
      microbatches: slices the batch into this many parts and sums their gradients, in float32, layer by layer. The sum
        equals the gradient of the whole batch; memory holds one part's activations, and the layer inputs of all parts.
      reduction: how the loss reduces over the examples of a batch. With ``"mean"`` the loss of the whole batch is the
        mean over the microbatches, with ``"sum"`` the sum. A mean over a varying number of tokens is neither: return
        their sum.
      batch_argnums: the arguments of ``loss_fn`` to slice along their first axis, counted from 0, the parameters. None
        slices all except the parameters. Other arguments are the same for each microbatch.
      loss_scale: multiplies the loss before it is differentiated, for float16; each layer's update divides the
        gradients by it, in float32. A number, or a :class:`DynamicLossScale`, which adapts it. The step after a change
        of that scale takes a second backward pass, and is skipped as a whole if a gradient is not finite.
      skip_nonfinite: leave parameters and state as they are, except the counter ``state.skipped``, if the loss, or the
        norm that ``max_grad_norm`` asks for, is not finite. Without ``max_grad_norm``, also leave each tensor (in a
        stack, each layer) whose gradient is not finite, or has entries above 1.8e19 if ``tx`` keeps anything of it:
        float32 cannot square them, so they must not enter moments. A step that writes nothing did not happen: no count
        and no schedule advances. False writes whatever comes.
      rms_metrics: report the root mean square of the updates and parameters of each layer.
      strict: refuse a loss in which a layer's gradients wait for another's: because parameters that a scan runs over
        have to be updated whole, or because layers in a list repeat and are not stacked.
      stochastic_rounding: None rounds bfloat16 and float16 parameters stochastically and others to nearest; False
        rounds all to nearest; True does what None does, and raises an error if no parameter has one of those dtypes.
      seed: seeds the stochastic rounding. Keys are made from the seed, the step, the leaf and the layer, so a resumed
        run repeats the same bits.
      offload: what to keep in the host's memory and move to the device and back layer by layer: the same numbers, more
        slowly. ``"params"``: the stacks of matrices that layer scans run over (each layer of the stack is whole
        matrices: the layer axis is not among the last two); put them there with ``params = step.place(params, *args)``
        before ``init``. Vectors, all other parameters, and the optimizer's state stay on the device. ``"activations"``:
        what each layer of a scan saves for the backward pass. Or both, as a tuple.
      roll: whether ``step.place`` stacks the layers of lists that a Python loop runs over, so that the step can scan
        over them. It also scans over a stack of your own whose layers such a loop takes one by one. True does so if
        it saves memory: from 3 layers on if they read their weights under ``jax.checkpoint``, otherwise from 6 on. A
        number stacks from that many layers on, whatever their kind, to save compile time. False leaves lists and
        stacks as they are: then each parameter is updated as a whole.

    Returns:
      A :class:`FusedStep`: ``init``, ``jit`` (donates parameters and state), ``unfused``, ``plan``, ``place``,
      ``unplace``.

    Raises:
      ValueError: for options that are out of range or contradict each other. While tracing, for a loss that is not a
        scalar, arguments or results that are not arrays, a parameter that cannot be trained, a batch that the
        microbatches do not divide, a ``tx`` that mixes leaves, draws random numbers or has ``layer_axes``, parameters
        or arguments unlike those of ``init``, parameters in another memory than ``offload`` says, references
        (``jax.new_ref``) in the loss. If arrays are not traced, for arrays that are sharded differently than in
        ``init``, or that a step has used; and in ``jit``, for one array under two names. Under a ``jax.jit`` of your
        own, JAX itself says that an array has been deleted or donated twice.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from adalomo_jax import adalomo, fuse
      >>> def loss_fn(params, x):
      ...     layer = jax.checkpoint(lambda x, w: (x + jnp.tanh(x @ w), None))
      ...     return jnp.mean(jax.lax.scan(layer, x, params["layers"])[0] @ params["head"])
      >>> params = {"layers": jnp.full((12, 4, 4), 0.1), "head": jnp.ones((4, 1))}
      >>> step = fuse(loss_fn, adalomo(1e-2), max_grad_norm=1.0)
      >>> x = jnp.ones((2, 4))
      >>> print(step.plan(params, x))
      parameter  shape   dtype    updated                 because
      head       4x1     float32  whole                   no scan reads it
      layers     12x4x4  float32  scan 0, layer by layer  a scan runs over its 12 layers
      gradients alive at once: 64 of 784 bytes
      >>> state = step.init(params, x)
      >>> losses = []
      >>> for _ in range(3):
      ...     params, state, loss, aux, metrics = step.jit(params, state, x)
      ...     losses.append(float(loss))
      >>> losses[0] > losses[1] > losses[2]
      True

    Source: the fused update and the two passes are LOMO's, https://arxiv.org/abs/2306.09782, section 3.
    """
    check_loss_and_tx(loss_fn, tx)
    options = Options(
        has_aux=has_aux,
        trainable=trainable,
        max_grad_norm=max_grad_norm,
        microbatches=microbatches,
        reduction=reduction,
        batch_argnums=batch_argnums,
        loss_scale=loss_scale,
        skip_nonfinite=skip_nonfinite,
        rms_metrics=rms_metrics,
        strict=strict,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
        offload=offload,
        roll=roll,
    )
    return FusedStep(loss_fn, optax.with_extra_args_support(tx), options)
