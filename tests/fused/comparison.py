"""Runs a fused step and its unfused twin side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adalomo_jax import StepResult, adalomo, fuse, lomo

RULES = {
    "adalomo": adalomo(1e-2),
    "lomo": lomo(1e-2),
    "adamw": optax.adamw(1e-3),
    "sgd with momentum": optax.sgd(1e-2, momentum=0.9),
}
RELATIVE_ERROR = 1e-5
"""The difference allowed between fused and unfused float32 parameters, state and loss after ten steps."""


def relative_error(actual, expected):
    """The largest ``|actual - expected| / |expected|`` of all leaves, with norms taken over a leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    errors = [0.0]
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert a.shape == e.shape and a.dtype == e.dtype
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert np.isfinite(a).all() and np.isfinite(e).all()
        errors.append(float(np.linalg.norm(a - e) / max(np.linalg.norm(e), 1e-30)))
    return max(errors)


def copied(tree):
    """A copy made by NumPy: JAX would compile a program for each shape."""
    return jax.tree.map(lambda x: jnp.asarray(np.array(x)), tree)


def run_both(loss_fn, tx, params, batches, **options):
    """The results of the last step, fused and unfused; each kind continues from its own results."""
    step = fuse(loss_fn, tx, **options)
    state = jax.jit(step.init)(params, *batches[0])
    run_unfused = jax.jit(step.unfused)
    fused, unfused = (copied((params, state)) for _ in range(2))
    results: list[StepResult] = []
    for args in batches:
        results = [step.jit(*fused, *args), run_unfused(*unfused, *args)]
        fused, unfused = ((result.params, result.state) for result in results)
    return results
