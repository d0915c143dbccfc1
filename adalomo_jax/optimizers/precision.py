"""Optimizers that compute in float32, or complex64, whatever the parameters' dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adalomo_jax.optimizers.arguments import check_floats


def in_float32(
    tx: optax.GradientTransformation, *, needs_params: bool = False
) -> optax.GradientTransformationExtraArgs:
    """``tx``, given float32 gradients and parameters; the updates come back in the gradients' dtypes.

    So the state of ``tx`` is float32, and ``learning_rate``, the decay rates and the update itself are rounded to a
    narrow dtype once, at the end. Float64 gradients and parameters become float32 too, and complex ones complex64.
    Leaves that are not floats raise a ValueError. With ``needs_params``, so does a call of ``update`` without
    parameters.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> optax.OptState:
        check_floats("params", params)
        return inner.init(jax.tree.map(as_float32, params))

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args):
        if needs_params and params is None:
            raise ValueError("The step depends on the parameters: call tx.update(grads, state, params).")
        check_floats("grads", updates)
        check_floats("params", params)
        dtypes = jax.tree.map(lambda g: g.dtype, updates)
        updates, params = jax.tree.map(as_float32, (updates, params))
        updates, state = inner.update(updates, state, params, **extra_args)
        return jax.tree.map(lambda u, dtype: u.astype(dtype), updates, dtypes), state

    return optax.GradientTransformationExtraArgs(init, update)


def promoted(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype to which JAX promotes these by default; it works even if a user has forbidden implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x + y`` in the dtype that holds both."""
    dtype = promoted(x.dtype, y.dtype)
    return x.astype(dtype) + y.astype(dtype)


def as_float32(x: Any) -> Any:
    """An array, or the shape of one, in float32; a complex one in complex64."""
    dtype = jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32
    return x.update(dtype=dtype) if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x, dtype)
