"""One call of a training step: fused, and by ``jax.vjp`` of the whole loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from adalomo_jax.fused.loss_scale import DynamicLossScale
from adalomo_jax.fused.offload import is_on_host, shapes_on_device
from adalomo_jax.fused.options import Options
from adalomo_jax.fused.plan.checks import check_state
from adalomo_jax.fused.plan.tracing import Traced
from adalomo_jax.fused.result import StepResult, by_path
from adalomo_jax.fused.run import passes
from adalomo_jax.fused.run.unfused import all_gradients
from adalomo_jax.fused.run.updater import Updater, any_written
from adalomo_jax.fused.sharding import constrain, of_own_state
from adalomo_jax.fused.state import FusedState
from adalomo_jax.optimizers.rounding import rounds_stochastically


def loss_and_aux(traced: Traced, options: Options, outputs: Sequence[Any]) -> tuple[jax.Array, Any]:
    """The loss of the batch and aux, given the program's outputs for each microbatch."""
    loss, *aux = outputs
    if options.microbatches is not None:
        loss = jnp.mean(loss) if options.reduction == "mean" else jnp.sum(loss)
    result = traced.result_treedef.unflatten([loss, *aux])
    return result if options.has_aux else (result, None)


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a training step, traced: with its options, its state, and the arguments for ``tx.update``."""

    loss_fn: Callable[..., Any]
    options: Options
    traced: Traced
    state: FusedState
    extra_args: Mapping[str, Any]

    def fused(self) -> StepResult:
        """The step that updates each layer while gradients flow back.

        If nothing can be updated before all gradients exist, it is the unfused step, which has less to keep in order.
        """
        plan, leaves, options = self.traced.plan, self.traced.leaves, self.options
        if not (plan.updates_early or any(map(is_on_host, leaves))):
            return self.unfused()
        updater = self._updater()
        offloads = options.offloads_activations
        ran = passes.forward(plan, leaves, self.traced.args, options.microbatches, self._d_loss(), offloads)
        result = loss_and_aux(self.traced, options, ran.outputs)
        measure = lambda: passes.norm_of_gradient(plan, ran, updater)
        looks_ahead, norm = self._looks_ahead(), None
        if looks_ahead is not False:
            norm = measure() if looks_ahead is True else lax.cond(looks_ahead, measure, lambda: jnp.float32(0))
            ran = passes.begin_after(ran, norm)
        updater = self._decide(updater, result, norm)
        return self._finish(result, passes.backward(plan, ran, updater, self.state.inner, leaves), norm)

    def unfused(self) -> StepResult:
        """The step by ``jax.vjp`` of the whole loss."""
        outputs, gradients = all_gradients(self.loss_fn, self.traced, self.options.microbatches, self._d_loss())
        result, updater = loss_and_aux(self.traced, self.options, outputs), self._updater()
        looks_ahead, norm = self._looks_ahead(), None
        if looks_ahead is not False:
            norm = jnp.where(looks_ahead, updater.measure(None, list(gradients.values())).squares.norm(), 0)
        updater = self._decide(updater, result, norm)
        leaves, inner, statistics = updater.update_all(self.state.inner, self.traced.leaves, gradients)
        return self._finish(result, passes.Pass(leaves, inner, statistics), norm)

    def _d_loss(self) -> jax.Array:
        """The cotangent of each microbatch's loss."""
        scale = self._scale
        d = jnp.ones([], jnp.float32) if scale is None else jnp.asarray(scale, jnp.float32)
        return d / self.options.microbatches if self.options.microbatches and self.options.reduction == "mean" else d

    @property
    def _scale(self) -> Any:
        scale = self.options.loss_scale
        return self.state.loss_scale.scale if isinstance(scale, DynamicLossScale) else scale

    def _updater(self) -> Updater:
        """The updater, without what depends on the loss."""
        optimizer, axes, plans = self.traced.optimizer, self.traced.axes, self.traced.plan.leaves
        shapes = shapes_on_device(self.traced.leaves)
        check_state(self.state.inner, jax.eval_shape(lambda leaves: optimizer.init(leaves, axes), shapes))
        scale, of_tensors = self._scale, tuple(leaf.tensor_sharding for leaf in plans)
        return Updater(
            optimizer=optimizer,
            axes=axes,
            shared=optimizer.shared(self.state.inner),
            keys=self._keys(),
            unscale=None if scale is None else 1 / jnp.asarray(scale, jnp.float32),
            measures_rms=self.options.rms_metrics,
            of_tensors=of_tensors,
            of_own={group: of_own_state(optimizer, group, of_tensors) for group in optimizer.groups},
        )

    def _keys(self) -> tuple[jax.Array | None, ...]:
        """The key that rounds each leaf in this step; None if the leaf is not rounded stochastically."""
        rounding = self.options.stochastic_rounding
        rounded = [
            rounding is not False and leaf.trained and (leaf.form != "" or rounds_stochastically(leaf.dtype))
            for leaf in self.traced.plan.leaves
        ]
        if rounding and not any(rounded):
            raise ValueError(
                "stochastic_rounding=True rounds bfloat16 and float16 parameters, and there are none among those that "
                "are trained. Leave it at None to round only parameters of these dtypes."
            )
        key = jax.random.fold_in(jax.random.key(self.options.seed), self.state.count)
        # All keys at once: each one alone would give the compiler some 150 scalar instructions.
        folded = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(rounded)))
        return tuple(folded[i] if is_rounded else None for i, is_rounded in enumerate(rounded))

    def _looks_ahead(self) -> bool | jax.Array:
        """Whether the step takes the norm of all gradients, in a backward pass of its own, before it writes anything.

        It does so to clip them, and if a dynamic loss scale has just changed, because the scale may be too large: a
        step in which gradients overflow is then skipped as a whole, and the step counters do not count it.
        """
        if isinstance(self.options.loss_scale, DynamicLossScale) and self.options.max_grad_norm is None:
            return self.state.loss_scale.finite_steps == 0
        return self.options.max_grad_norm is not None

    def _decide(self, updater: Updater, result: tuple[jax.Array, Any], norm: jax.Array | None) -> Updater:
        """The updater that knows the loss, and the norm if that is computed first."""
        clip, proceed, loss = None, None, result[0]
        if self.options.skip_nonfinite:
            proceed = jnp.isfinite(loss) if norm is None else jnp.isfinite(loss) & jnp.isfinite(norm)
        if norm is not None and self.options.max_grad_norm is not None:
            most = jnp.float32(self.options.max_grad_norm)
            clip = jnp.where(norm < most, 1.0, most / norm)
        return replace(updater, clip=clip, proceed=proceed, extra_args={"value": loss, **self.extra_args})

    def _finish(self, result: tuple[jax.Array, Any], done: passes.Pass, norm: jax.Array | None) -> StepResult:
        """The result, with the state's counters and the metrics."""
        loss, aux = result
        state, traced = self.state, self.traced
        if norm is None or self.options.max_grad_norm is None:  # it was not computed, or not in every step
            norm = passes.norm_in(done.statistics)
        unwritten = sum((jnp.sum(~s.written) for s in done.statistics.values()), start=jnp.zeros([], jnp.int32))
        wrote = any_written(done.statistics)
        metrics: dict[str, Any] = {"loss": loss, "grad_norm": norm, "skipped": ~wrote, "unwritten": unwritten}
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
