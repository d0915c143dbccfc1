"""Optimizers whose arithmetic is float32, whatever the parameters are."""

import jax
import jax.numpy as jnp
import optax


def in_float32(
    tx: optax.GradientTransformation, *, needs_params: bool = False
) -> optax.GradientTransformationExtraArgs:
    """``tx``, given float32 gradients and parameters; the updates come back in the gradients' dtypes.

    So the state of ``tx`` is float32, and ``learning_rate``, the decay rates and the update itself are rounded to a
    narrow dtype once, at the end. Float64 gradients and parameters are computed with in float32 too. With
    ``needs_params``, ``update`` raises a ValueError where it is called without parameters.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(jax.tree.map(_as_float32, params))

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args):
        if needs_params and params is None:
            raise ValueError("The step depends on the parameters: call tx.update(grads, state, params).")
        dtypes = jax.tree.map(lambda g: g.dtype, updates)
        updates, params = jax.tree.map(_as_float32, (updates, params))
        updates, state = inner.update(updates, state, params, **extra_args)
        return jax.tree.map(lambda u, dtype: u.astype(dtype), updates, dtypes), state

    return optax.GradientTransformationExtraArgs(init, update)


def _as_float32(x):
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=jnp.float32)
    return jnp.asarray(x, jnp.float32)


def promoted(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype that holds these, as JAX promotes by default: a user may forbid that to happen unsaid."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x + y`` in the dtype that holds both."""
    dtype = promoted(x.dtype, y.dtype)
    return x.astype(dtype) + y.astype(dtype)
