"""`TrainState`: like `flax.training.train_state.TrainState` in a Linen loop, with the fused step inside."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import serialization, struct

from adalomo_jax.fused import FusedState, FusedStep, InStack, Plan, Signature, StepResult, fuse
from adalomo_jax.optimizers import Float24, Int8

# These are part of the structure: a restored state takes them from the state that it is restored into.
for static in (Signature, InStack):
    serialization.register_serialization_state(static, lambda _: {}, lambda x, _: x)


def _parts(x: Any) -> dict[str, Any]:
    """The arrays of a weight that is kept in another form, by name."""
    return {path[0].name: part for path, part in jax.tree_util.tree_leaves_with_path(x)}


def _restored(x: Any, parts: dict[str, Any]) -> Any:
    found, due = ({name: jnp.shape(part) for name, part in of.items()} for of in (parts, _parts(x)))
    if found != due:
        raise ValueError(f"The saved weight has the parts {found}, but the form of the target, {x!r}, has {due}.")
    return jax.tree.structure(x).unflatten([parts[name] for name in due])


for form in (Int8, Float24):
    serialization.register_serialization_state(form, _parts, _restored)


class TrainState(struct.PyTreeNode):
    """Parameters, the optimizer's state, and the step that updates both in place.

    ``state, result = state.step(*batch)`` equals ``params, opt_state, *result = fuse(loss_fn, tx).jit(params,
    opt_state, *batch)``. The state is a pytree of arrays: `flax.serialization` and Orbax save ``params`` and
    ``opt_state``, and restore them into a state that `create` made, from whatever weights.

    **The old state is gone after a step**: its arrays are donated and become those of the new state. The first step
    does the same with the parameters that `create` was given. If you need them later, keep a copy,
    ``jax.tree.map(jnp.copy, state.params)``.

    **Whatever else the loss reads is an argument of the step, and whatever else it returns is in** ``result.aux``. The
    state hides nothing: you pass collections such as ``batch_stats`` along by hand, and make a dropout key from
    ``state.count``::

        def loss_fn(params, x, y, batch_stats, key):
            variables = {"params": params, "batch_stats": batch_stats}
            out, new = model.apply(variables, x, mutable=["batch_stats"], rngs={"dropout": key})
            return jnp.mean((out - y) ** 2), new["batch_stats"]

        state = TrainState.create(x, y, batch_stats, key, loss_fn=loss_fn, params=params, tx=tx, has_aux=True)
        for x, y in batches:
            state, result = state.step(x, y, batch_stats, jax.random.fold_in(key, state.count))
            batch_stats = result.aux

    A subclass may carry them, as with Flax's `TrainState`: give it a field with a default, ``batch_stats: Any = None``,
    and set it with ``state.replace(batch_stats=result.aux)``.

    **Submodules that a Python loop calls**, ``Block_0``, ``Block_1`` and so on, are unrolled in the program, and each
    is updated whole, one after another. ``create(..., roll=True)`` stacks those that repeat, and the step scans over
    them, with the memory and the compile time of a model that was written with ``nn.scan``. Then ``params`` is what
    `FusedStep.place` returns, which ``model.apply`` does not take; give it `unplaced_params`. Place weights that come
    from elsewhere first: ``state.replace(params=state.fused.place(params, *batch))``.

    `step` compiles once. In a function of your own under ``jax.jit`` it is part of that program; there, donate the
    state yourself with ``donate_argnums``, or the step updates it in a second copy.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from adalomo_jax import adalomo
      >>> from adalomo_jax.linen import TrainState
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda params, x: jnp.mean(jnp.square(model.apply({"params": params}, x)))
      >>> state = TrainState.create(x, loss_fn=loss_fn, params=params, tx=adalomo(1e-2))
      >>> state, first = state.step(x)
      >>> state, second = state.step(x)
      >>> bool(second.loss < first.loss), int(state.count)
      (True, 2)
    """

    params: Any
    """The parameters; with ``roll``, they hold repeated layers as stacks."""
    opt_state: FusedState
    """The state of the fused step."""
    fused: FusedStep = struct.field(pytree_node=False)
    """The step, made once by `create`: another step, even an equal one, compiles again."""
    apply_fn: Callable[..., Any] | None = struct.field(pytree_node=False, default=None)
    """Usually ``model.apply``; kept for your own use. The step does not call it."""

    @classmethod
    def create(
        cls,
        *batch: Any,
        loss_fn: Callable[..., Any],
        params: Any,
        tx: optax.GradientTransformation,
        apply_fn: Callable[..., Any] | None = None,
        roll: bool | int = False,
        extra_args: Mapping[str, Any] = MappingProxyType({}),
        **options: Any,
    ) -> "TrainState":
        """The state to begin with.

        Args:
          *batch: arguments as `step` will get them, or ``jax.ShapeDtypeStruct``s: the loss is traced, not run.
          loss_fn: ``loss_fn(params, *batch)`` returns a scalar, or ``(scalar, aux)`` with ``has_aux=True``.
          params: a pytree of arrays of floats, usually ``model.init(...)["params"]``; the first step donates them.
          tx: a transformation that treats leaves separately, see :func:`adalomo_jax.fuse`.
          apply_fn: kept in the state.
          roll: whether to stack repeated layers that a Python loop calls: True, or from how many layers on, as in
            :func:`adalomo_jax.fuse`. The stacks are copies: drop your own ``params`` afterwards, or their layers are
            in memory twice.
          extra_args: arguments that `step` will get by name, if ``tx.update`` requires them: with ``roll``, `create`
            calls it.
          **options: the options of :func:`adalomo_jax.fuse`.

        Raises:
          ValueError: as :func:`adalomo_jax.fuse` does.
        """
        fused = fuse(loss_fn, tx, roll=roll, **options)
        params = fused.place(params, *batch, **extra_args) if roll else params
        return cls(params=params, opt_state=fused.init(params, *batch), fused=fused, apply_fn=apply_fn)

    @property
    def count(self) -> jax.Array:
        """Steps taken, int32. (Flax's `TrainState` calls this ``state.step``, which here is the step itself.)"""
        return self.opt_state.count

    @property
    def unplaced_params(self) -> Any:
        """The parameters as `create` was given them, for ``apply_fn`` and to save.

        Stacked layers are returned as copies: as long as you keep them, those weights are in memory twice. Without
        stacks these are ``params``. Within ``jax.jit``, as in ``jax.jit(lambda state, x:
        state.apply_fn({"params": state.unplaced_params}, x))``, XLA reads the layers of the stacks where they are used.
        """
        return self.fused.unplace(self.params)

    def step(self, *batch: Any, **extra_args: Any) -> tuple["TrainState", StepResult]:
        """The state after one step, and what the step returned: ``loss``, ``aux`` and ``metrics``.

        Arguments by name go to ``tx.update``, which also gets the loss as ``value``.

        In the result ``params`` and ``state`` are None: they are in the new state, and a function under ``jax.jit``
        would return the parameters twice. Donates the arrays of the old state.
        """
        result = self.fused.jit(self.params, self.opt_state, *batch, **extra_args)
        state = self.replace(params=result.params, opt_state=result.state)
        return state, result._replace(params=None, state=None)

    def plan(self, *batch: Any) -> Plan:
        """Where each parameter is updated, as a value that prints as a table. Computes nothing."""
        return self.fused.plan(self.params, *batch)

    def lower(self, *batch: Any, **extra_args: Any) -> Any:
        """The step, lowered: ``state.lower(*batch).compile().memory_analysis()`` says how much memory it needs."""
        return self.fused.jit.lower(self.params, self.opt_state, *batch, **extra_args)
