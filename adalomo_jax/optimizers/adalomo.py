"""AdaLomo as an Optax gradient transformation."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adalomo_jax.optimizers.arguments import (
    check_above_zero,
    check_floats,
    check_learning_rate,
    check_not_negative,
    check_number,
    checked_mask,
)
from adalomo_jax.optimizers.layer_axes import LayerAxes
from adalomo_jax.optimizers.matrix_axes import (
    MatrixAxesOption,
    check_matrix_axes,
    factor_shapes,
    leaf_name,
    matrix_axes_of_leaves,
)
from adalomo_jax.optimizers.moments import (
    FactoredMoment,
    Moment,
    is_factored,
    new_share_at,
    normalized_update,
    rms,
    row_and_col_means,
)
from adalomo_jax.optimizers.per_layer import per_layer
from adalomo_jax.optimizers.precision import as_float32, in_float32
from adalomo_jax.optimizers.sums import Axes


class ScaleByAdalomoState(NamedTuple):
    """State of :func:`scale_by_adalomo`: a count, and three trees of float32 arrays, structured like the parameters.

    If a tensor is factored, its ``v`` is a zero of shape ``[1]``; otherwise its ``v_row`` and ``v_col`` are. Rows and
    columns are the last two axes, or those that ``matrix_axes`` names. ``v_row`` has all axes of the tensor except the
    columns, ``v_col`` all except the rows: if the columns of ``[D, N, H]`` are N and H, they are ``[D]`` and
    ``[N, H]``.
    """

    count: jax.Array
    """Steps taken, int32."""
    v_row: Any
    """For a tensor ``[..., m, n]``, the moving average of ``mean(g**2, axis=columns)``, ``[..., m]``."""
    v_col: Any
    """For a tensor ``[..., m, n]``, the moving average of ``mean(g**2, axis=rows)``, ``[..., n]``."""
    v: Any
    """For a tensor with fewer than two axes, the moving average of ``g**2``, in the tensor's shape."""


def scale_by_adalomo(
    *,
    decay_rate: float | jax.Array = 0.8,
    b2: float | jax.Array | None = None,
    clipping_threshold: float | jax.Array = 1.0,
    eps: float | jax.Array = 1e-30,
    layer_axes: LayerAxes = None,
    matrix_axes: MatrixAxesOption = "attention",
) -> optax.GradientTransformation:
    """Divides gradients by the root of AdaLomo's factored second moment and normalizes each tensor's update.

    Equals ``u = g / sqrt(v); u / max(1, RMS(u) / clipping_threshold)`` for each tensor, with ``v`` as in
    :mod:`adalomo_jax.optimizers.moments`. :func:`adalomo` adds the weight decay and the learning rate.

    Args:
      decay_rate: the moments' decay at step ``t = 1, 2, ...`` is ``beta_t = 1 - t**-decay_rate``; above 0.
      b2: if given, the constant decay of the paper's algorithm 1, in place of ``beta_t``; from 0 to less than 1.
      clipping_threshold: the largest root mean square of a tensor's update; above 0.
      eps: added to the squared gradient; above 0.
      layer_axes: see :func:`per_layer`; each layer of a stack then counts as a tensor of its own.
      matrix_axes: see :func:`adalomo`.

    Returns:
      A transformation whose state is a :class:`ScaleByAdalomoState` and whose updates have the gradients' dtypes.

    Raises:
      ValueError: a number is out of its range; in ``init`` and ``update``, leaves of a tree are not floats, or
        ``matrix_axes`` are not axes of their leaf.

    Source: Lv et al. (2023), https://arxiv.org/abs/2310.10195, algorithm 1, without the learning rate.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_adalomo()
      >>> grads = {"w": jnp.full((4, 2), 3.0)}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> float(updates["w"][0, 0]), state.v_row["w"].shape, state.v_col["w"].shape
      (1.0, (4,), (2,))
    """
    if b2 is not None:
        check_number("b2", b2, lambda x: 0 <= x < 1, "at least 0 and less than 1")
    check_above_zero("decay_rate", decay_rate)
    check_above_zero("clipping_threshold", clipping_threshold)
    if getattr(eps, "dtype", None) == jnp.float16:  # Optax may inject it in this dtype, in which 1e-30 is 0
        check_not_negative("eps", eps)
    else:
        check_above_zero("eps", eps)
    check_matrix_axes(matrix_axes)

    def init(params: optax.Params) -> ScaleByAdalomoState:
        check_floats("params", params)
        leaves, treedef = jax.tree.flatten(params)
        unused = lambda: tuple(
            jnp.zeros(1, jnp.float32) for _ in range(3)
        )  # separate arrays, so that each can be donated
        axes = matrix_axes_of_leaves(params, matrix_axes)
        parts = [_with_moment(unused(), _init_moment(p, p_axes)) for p, p_axes in zip(leaves, axes, strict=True)]
        return _state_of(jnp.zeros([], jnp.int32), treedef, parts)

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None):
        del params
        check_floats("grads", updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        new_share = new_share_at(count, decay_rate) if b2 is None else jnp.asarray(1.0 - b2, jnp.float32)
        gradients, treedef = jax.tree_util.tree_flatten_with_path(updates)
        axes = matrix_axes_of_leaves(updates, matrix_axes)
        step = partial(normalized_update, new_share=new_share, eps=eps, threshold=clipping_threshold)
        scaled, parts = [], []
        olds = map(treedef.flatten_up_to, (state.v_row, state.v_col, state.v))
        for (path, g), g_axes, *old in zip(gradients, axes, *olds, strict=True):
            moment = old[2]
            if is_factored(g.shape):
                _check_factors(path, g.shape, g_axes, old)
                moment = FactoredMoment(*old[:2])
            u, moment = step(moment, as_float32(g), axes=g_axes)
            scaled.append(u.astype(g.dtype))
            parts.append(_with_moment(old, moment))
        return treedef.unflatten(scaled), _state_of(count, treedef, parts)

    return per_layer(optax.GradientTransformation(init, update), layer_axes)


def scale_by_param_rms(min_param_rms: float | jax.Array = 1e-3) -> optax.GradientTransformation:
    """Multiplies each tensor's update by ``max(min_param_rms, RMS(parameter))``.

    Equals ``optax.scale_by_param_block_rms``, but reads the parameter once.

    Args:
      min_param_rms: the smallest factor, so that a tensor of zeros can move; 0 or more.

    Returns:
      A transformation without a state, whose ``update`` needs ``params``.

    Raises:
      ValueError: ``min_param_rms`` is negative; in ``update``, ``params`` is missing, or gradients are not floats.

    Source: Shazeer and Stern (2018), https://arxiv.org/abs/1804.04235, section 8.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_param_rms()
      >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(None), {"w": jnp.array([3.0, -3.0])})
      >>> updates["w"].tolist()
      [3.0, 3.0]
    """
    check_not_negative("min_param_rms", min_param_rms)

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None):
        if params is None:
            raise ValueError("The step depends on the parameters: call tx.update(grads, state, params).")
        check_floats("grads", updates)
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
    matrix_axes: MatrixAxesOption = "attention",
) -> optax.GradientTransformationExtraArgs:
    """AdaLomo: low-memory optimization with an adaptive learning rate.

    Equals, for each tensor ``theta`` with gradient ``g``, in float32::

        u = g / sqrt(v)                                      # v: the factored second moment
        u = u / max(1, RMS(u) / clipping_threshold)
        a = learning_rate(t) * max(min_param_rms, RMS(theta))
        theta = theta - a * (u + weight_decay * theta)

    This is the official PyTorch rule (lomo-optim): the arithmetic of Adafactor without momentum, with each layer as a
    tensor of its own. The state holds ``m + n + 1`` float32 numbers for a matrix ``[m, n]``. For complex parameters
    ``g**2`` means ``|g|**2``; pass the conjugates of JAX's gradients, as to any Optax rule.

    Args:
      learning_rate: the step relative to the root mean square of a tensor's weights; a float, at least 0, or a schedule
        of the step count, which starts at 0. Fine-tuning takes 5e-4 to 2e-3.
      decay_rate: the moments' decay at step ``t = 1, 2, ...`` is ``1 - t**-decay_rate``; above 0.
      b2: if given, the constant decay that the paper prints, in place of ``decay_rate``; from 0 to less than 1.
      clipping_threshold: the largest root mean square of a tensor's update before the learning rate; above 0.
      eps: added to the squared gradient; above 0.
      min_param_rms: a lower bound on the root mean square of a tensor, so that zeros can move; at least 0.
      weight_decay: decoupled; multiplied, like the update, by the learning rate and the root mean square; at least 0.
      weight_decay_mask: as in ``optax.add_decayed_weights``: a tree of bools, a prefix of it, or a callable.
      layer_axes: for each parameter, the axis along which layers are stacked for a scan, or None; a tree, a prefix of
        one, or a callable that makes it from the parameters. Each layer then counts as a tensor of its own. Not needed
        under ``fuse``, which finds the stacks by itself.
      matrix_axes: for each parameter, the ``MatrixAxes(rows, columns)`` over which it is factored as a matrix (in a
        stack, the axes of one layer), or None for the last two axes: a tree, a prefix of one, or a function of path
        and shape, such as ``"layers/attn/query/kernel"`` and ``(512, 8, 64)``. Several axes act as one, without a
        reshape; the remaining axes are batch axes of the factors. Optax's ``MuonDimensionNumbers`` are accepted, too.
        The default is :func:`attention_axes`, which knows the attention kernels of Flax, MaxText, tunix and Gemma by
        name and shape; None takes the last two axes of every parameter.

    Under ``optax.inject_hyperparams``, pass ``hyperparam_dtype=jnp.float32`` if parameters are narrower: it defaults to
    their dtype, and a ``b2`` of 0.999 is 1 in bfloat16.

    Returns:
      A transformation whose updates have the gradients' dtypes and whose moments are float32.

    Raises:
      ValueError: an argument is out of its range; in ``init`` and ``update``, leaves are not floats; in ``update``,
        ``params`` is missing, or the state was made with other ``matrix_axes``.

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
    check_learning_rate(learning_rate)
    check_not_negative("weight_decay", weight_decay)
    rule = optax.chain(
        scale_by_adalomo(
            decay_rate=decay_rate, b2=b2, clipping_threshold=clipping_threshold, eps=eps, matrix_axes=matrix_axes
        ),
        optax.add_decayed_weights(weight_decay, checked_mask("weight_decay_mask", weight_decay_mask)),
        scale_by_param_rms(min_param_rms),
        optax.scale_by_learning_rate(learning_rate),
    )
    return per_layer(in_float32(rule, needs_params=True), layer_axes)


def _init_moment(p: Any, axes: Axes) -> Moment:
    """Zeros with the shapes that `accumulate` gives, and with its shardings on an explicit mesh."""
    statistics = partial(row_and_col_means, axes=axes) if is_factored(p.shape) else lambda s: s
    return jax.tree.map(
        lambda x: jnp.zeros_like(x), jax.eval_shape(lambda p: statistics(jnp.zeros_like(p, jnp.float32)), p)
    )


def _check_factors(path: Any, shape: tuple[int, ...], axes: Axes, parts: Sequence[Any]) -> None:
    """Refuses a state that was made with other axes."""
    for name, x, due in zip(("v_row", "v_col"), parts, factor_shapes(shape, axes)):
        if jnp.shape(x) != due:
            raise ValueError(
                f"The state's {name} of {leaf_name(path)!r} has the shape {jnp.shape(x)}, but {due} is due, for rows "
                f"{axes[0]} and columns {axes[1]} of its shape {shape}. Give adalomo the matrix_axes that the state "
                "was made with, which in versions without this argument were None, or make a new state."
            )


def _with_moment(parts: Sequence[Any], moment: Moment) -> tuple[Any, Any, Any]:
    """``v_row``, ``v_col`` and ``v`` after a step, with this moment; unused entries keep their old array."""
    row, col, v = parts
    return (moment.row, moment.col, v) if isinstance(moment, FactoredMoment) else (row, col, moment)


def _state_of(count: jax.Array, treedef: Any, parts: Sequence[tuple[Any, Any, Any]]) -> ScaleByAdalomoState:
    """Three trees of arrays, as in Optax's factored state: Flax's NNX keeps one array for each parameter."""
    return ScaleByAdalomoState(count, *(treedef.unflatten([part[k] for part in parts]) for k in range(3)))
