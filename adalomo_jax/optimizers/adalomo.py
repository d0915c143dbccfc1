"""AdaLomo as an Optax gradient transformation."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adalomo_jax.optimizers.moments import (
    Moment,
    is_factored,
    new_share_at,
    normalized_update,
    rms,
    row_and_col_means,
)
from adalomo_jax.optimizers.per_layer import LayerAxes, per_layer
from adalomo_jax.optimizers.precision import in_float32


class ScaleByAdalomoState(NamedTuple):
    """State of :func:`scale_by_adalomo`."""

    count: jax.Array
    """Steps taken, int32."""
    moments: Any
    """A tree like the parameters: of each the second moment, a ``FactoredMoment`` (``[..., m]`` and ``[..., n]`` of a
    tensor ``[..., m, n]``), or an array like the parameter where it has fewer than two axes. Always float32."""


def scale_by_adalomo(
    *,
    decay_rate: float | jax.Array = 0.8,
    b2: float | jax.Array | None = None,
    clipping_threshold: float | jax.Array = 1.0,
    eps: float | jax.Array = 1e-30,
    layer_axes: LayerAxes = None,
) -> optax.GradientTransformation:
    """Divides gradients by the root of AdaLomo's factored second moment and normalizes each tensor's update.

    Equals ``u = g / sqrt(v); u / max(1, RMS(u) / clipping_threshold)`` for each tensor, with ``v`` as in
    :mod:`adalomo_jax.optimizers.moments`. :func:`adalomo` adds the weight decay and the learning rate.

    Args:
      decay_rate: the moments' decay at step ``t = 1, 2, ...`` is ``beta_t = 1 - t**-decay_rate``.
      b2: where given, the constant decay of the paper's algorithm 1 in place of ``beta_t``, from 0 to less than 1.
      clipping_threshold: the largest root mean square of a tensor's update.
      eps: added to the squared gradient.
      layer_axes: see :func:`per_layer`; each layer of a stack is then a tensor of its own.

    Returns:
      A transformation whose state is a :class:`ScaleByAdalomoState` and whose updates have the gradients' dtypes.
    """
    _check_constant("b2", b2, lambda x: 0 <= x < 1, "at least 0 and less than 1")
    _check_constant("decay_rate", decay_rate, lambda x: x > 0, "above 0")
    _check_constant("clipping_threshold", clipping_threshold, lambda x: x > 0, "above 0")
    _check_constant("eps", eps, lambda x: x > 0, "above 0")

    def init(params: optax.Params) -> ScaleByAdalomoState:
        return ScaleByAdalomoState(count=jnp.zeros([], jnp.int32), moments=jax.tree.map(_init_moment, params))

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        new_share = new_share_at(count, decay_rate) if b2 is None else jnp.asarray(1.0 - b2, jnp.float32)
        gradients, treedef = jax.tree.flatten(updates)
        step = partial(normalized_update, new_share=new_share, eps=eps, threshold=clipping_threshold)
        pairs = [
            step(moment, g.astype(jnp.float32)) for g, moment in zip(gradients, treedef.flatten_up_to(state.moments))
        ]
        scaled = [u.astype(g.dtype) for g, (u, _) in zip(gradients, pairs)]
        return treedef.unflatten(scaled), ScaleByAdalomoState(count, treedef.unflatten([moment for _, moment in pairs]))

    return per_layer(optax.GradientTransformation(init, update), layer_axes)


def scale_by_param_rms(min_param_rms: float | jax.Array = 1e-3) -> optax.GradientTransformation:
    """Multiplies each tensor's update by ``max(min_param_rms, RMS(parameter))``.

    Equals ``optax.scale_by_param_block_rms``, but reads the parameter once.
    """

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None):
        if params is None:
            raise ValueError("The step depends on the parameters: call tx.update(grads, state, params).")
        scaled = jax.tree.map(lambda u, p: (u * jnp.maximum(min_param_rms, rms(p))).astype(u.dtype), updates, params)
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def adalomo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay_rate: float | jax.Array = 0.8,
    b2: float | jax.Array | None = None,
    clipping_threshold: float | jax.Array = 1.0,
    eps: float | jax.Array = 1e-30,
    min_param_rms: float | jax.Array = 1e-3,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    layer_axes: LayerAxes = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaLomo: low-memory optimization with an adaptive learning rate.

    Equals, for each tensor ``theta`` with gradient ``g``, in float32::

        u = g / sqrt(v)                                      # v: the factored second moment
        u = u / max(1, RMS(u) / clipping_threshold)
        a = learning_rate(t) * max(min_param_rms, RMS(theta))
        theta = theta - a * (u + weight_decay * theta)

    which is the official PyTorch rule (lomo-optim). The arithmetic is that of Adafactor without momentum, each layer a
    tensor of its own. The state holds ``m + n`` float32 numbers for a matrix ``[m, n]``.

    Args:
      learning_rate: the step relative to the root mean square of a tensor's weights; a float or a schedule of the step
        count, which starts at 0. Fine-tuning takes 5e-4 to 2e-3.
      decay_rate: the moments' decay at step ``t = 1, 2, ...`` is ``1 - t**-decay_rate``.
      b2: where given, the constant decay that the paper prints, in place of ``decay_rate``.
      clipping_threshold: the largest root mean square of a tensor's update before the learning rate.
      eps: added to the squared gradient.
      min_param_rms: the least root mean square that a tensor is taken to have, so that zeros can move.
      weight_decay: decoupled, multiplied with the learning rate and the root mean square as the update is.
      weight_decay_mask: as in ``optax.add_decayed_weights``: a tree of bools, a prefix of it, or a callable.
      layer_axes: of each parameter the axis along which layers are stacked for a scan, or None; a tree, a prefix of
        one, or a callable that makes it from the parameters. Each layer is then a tensor of its own. Not needed under
        ``fuse``, which finds the stacks by itself.

    Under ``optax.inject_hyperparams``, give ``hyperparam_dtype=jnp.float32`` where parameters are narrower: its default
    is their dtype, and a ``b2`` of 0.999 is 1 in bfloat16.

    Returns:
      A transformation whose updates have the gradients' dtypes and whose moments are float32.

    Raises:
      ValueError: for a constant out of its range, or, in ``update``, where ``params`` is missing.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from adalomo_jax import adalomo
      >>> tx = adalomo(1e-2)
      >>> params = {"w": jnp.ones((2, 3))}
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
      >>> updates, state = tx.update(grads, state, params)
      >>> print(optax.apply_updates(params, updates)["w"][0])
      [0.99 0.99 0.99]

    Source: Lv et al., https://arxiv.org/abs/2310.10195, algorithm 1.
    """
    _check_constant("min_param_rms", min_param_rms, lambda x: x >= 0, "at least 0")
    rule = optax.chain(
        scale_by_adalomo(decay_rate=decay_rate, b2=b2, clipping_threshold=clipping_threshold, eps=eps),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_param_rms(min_param_rms),
        optax.scale_by_learning_rate(learning_rate),
    )
    return per_layer(in_float32(rule, needs_params=True), layer_axes)


def _init_moment(p: Any) -> Moment:
    """Zeros with the shapes, and on an explicit mesh the shardings, that `accumulate` gives."""
    statistics = row_and_col_means if is_factored(p.shape) else lambda s: s
    return jax.tree.map(
        lambda x: jnp.zeros_like(x), jax.eval_shape(lambda p: statistics(jnp.zeros_like(p, jnp.float32)), p)
    )


def _check_constant(name: str, value: Any, holds, invariant: str) -> None:
    """Arrays are let through: under ``optax.inject_hyperparams`` they are traced."""
    if isinstance(value, (int, float)) and not holds(value):
        raise ValueError(f"{name} must be {invariant}, got {value}.")
