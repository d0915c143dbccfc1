"""`FusedStep`: the training step that `fuse` makes, with its state, its plan, and where its parameters lie."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import optax

from adalomo_jax.fused.convert import state_of_layers, state_of_stacks
from adalomo_jax.fused.offload import fetch, place, put_beside
from adalomo_jax.fused.options import Options
from adalomo_jax.fused.plan.checks import (
    check_by_position,
    check_extra_args,
    check_not_deleted,
    check_placed,
    warn_of_whole,
)
from adalomo_jax.fused.plan.placed_tree import is_stacked, layers_of, stack_layers, unstack_layers
from adalomo_jax.fused.plan.plan import Plan
from adalomo_jax.fused.plan.rolling import find_stacks
from adalomo_jax.fused.plan.selection import leaves_on_host
from adalomo_jax.fused.plan.tracing import Traced, trace_call
from adalomo_jax.fused.result import Donating, StepResult, check_call
from adalomo_jax.fused.run import passes
from adalomo_jax.fused.run.call import Call, loss_and_aux
from adalomo_jax.fused.run.evaluation import outputs_of
from adalomo_jax.fused.sharding import sharding_of
from adalomo_jax.fused.state import FusedState, make_abstract_state, make_state
from adalomo_jax.optimizers.kept import is_kept


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
          layers/0   12x4x4  float32  scan 0, layer by layer  a scan runs over its 12 layers, stacked from a list
          gradients alive at once: 64 of 768 bytes
          >>> params["layers"][2]
          InStack(stack="['layers'][0]", layer=2)
          >>> len(step.unplace(params)["layers"]), step.unplace(params)["layers"][2].shape
          (12, (4, 4))

          A mask that names one of them:

          >>> step = fuse(loss_fn, adalomo(1e-2), trainable=lambda path: path != "layers/3")
          >>> print(step.plan(step.place({"layers": [jnp.full((4, 4), 0.1) for _ in range(4)]}, x), x))
          parameter  shape  dtype    updated                 because
          layers/0   3x4x4  float32  scan 0, layer by layer  a scan runs over its 3 layers, stacked from a list
          layers/3   4x4    float32  not                     it is not trained, and layers/2 is
          gradients alive at once: 64 of 192 bytes
        """
        check_not_deleted(params, "params")
        if self.options.roll and not is_stacked(params):
            params = stack_layers(params, find_stacks(self.loss_fn, self.tx, self.options, params, args, extra_args))
        plan = self.plan(params, *args)
        on_host = leaves_on_host(plan, self.options)
        leaves, treedef = jax.tree.flatten(params, is_leaf=is_kept)
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
            traced = self._trace_step(params, state, args, extra_args)
            check_placed(traced.plan, traced.leaves, self.options)
            return Call(self.loss_fn, self.options, traced, state, extra_args).fused()

    @cached_property
    def jit(self) -> Donating:
        """This step under ``jax.jit``, with parameters and state donated, so that they are updated in place."""
        return Donating(jax.jit(self.__call__, donate_argnums=(0, 1)))

    def unfused(self, params: Any, state: FusedState, *args: Any, **extra_args: Any) -> StepResult:
        """The same step by ``jax.vjp``, with all gradients at once. The fused step must equal it."""
        traced = self._trace_step(params, state, args, extra_args, fetch)
        result = Call(self.loss_fn, self.options, traced, state, extra_args).unfused()
        return result._replace(params=jax.tree.map(put_beside, result.params, params))

    def loss(self, params: Any, *args: Any) -> Any:
        """``loss_fn(params, *args)`` for parameters as the step takes them, placed or in another form such as `Int8`.

        One layer of a stack exists as floats at a time, and with ``microbatches`` one part of the batch is computed at
        a time. It is pure: run it under ``jax.jit``.

        Args:
          params: the loss's first argument: a tree of arrays and of weights in other forms.
          args: the loss's other arguments.

        Returns:
          The loss of the batch; with ``has_aux`` a pair of it and ``aux``.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> from adalomo_jax import adalomo, fuse, int8
          >>> loss_fn = lambda params, x: jnp.mean(jax.lax.scan(lambda x, w: (x @ w, None), x, params)[0])
          >>> step = fuse(loss_fn, adalomo(1e-2))
          >>> params, x = int8(jnp.full((12, 4, 4), 0.25)), jnp.ones((2, 4))
          >>> print(f"{jax.jit(step.loss)(params, x):.1f}")
          1.0
        """
        with jax.disable_jit(False):
            traced = self._trace(params, args)
            outputs = outputs_of(traced.plan, traced.leaves, traced.args, traced.sliced, self.options.microbatches)
        loss, aux = loss_and_aux(traced, self.options, outputs)
        return (loss, aux) if self.options.has_aux else loss

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
