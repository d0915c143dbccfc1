"""Counts a program's FLOPs in matrix products and convolutions by walking its jaxpr: XLA counts a loop's body once."""

import math

import jax
from jax.extend import core


def count(fn, *args):
    """FLOPs of all products and convolutions of ``fn(*args)``, each as often as its scans run it."""
    return of_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)


def of_jaxpr(jaxpr):
    """FLOPs of all products and convolutions of a jaxpr."""
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(eqn):
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        out_features, *_ = eqn.params["dimension_numbers"].rhs_spec
        kernel = eqn.invars[1].aval.shape
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[out_features]
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    return times * sum(of_jaxpr(getattr(inner, "jaxpr", inner)) for inner in core.jaxprs_in_params(eqn.params))
