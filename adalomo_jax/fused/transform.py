"""`fuse` makes a loss and an optimizer into a training step in which the model's gradients never all exist."""

from collections.abc import Callable
from typing import Any, Literal

import optax

from adalomo_jax.fused.loss_scale import DynamicLossScale
from adalomo_jax.fused.options import Options, check_loss_and_tx
from adalomo_jax.fused.step import FusedStep


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
