"""In which form a decoder's weights are kept between steps: the matrices of its layers in one byte, or in three."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax

from adalomo_jax.optimizers.float24 import encode as encode_float24
from adalomo_jax.optimizers.float24 import float24
from adalomo_jax.optimizers.int8 import encode as encode_int8
from adalomo_jax.optimizers.int8 import int8
from adalomo_jax.optimizers.kept import Kept

Weights = Literal["int8", "bf16+8"]
"""A form, by its name on the command line."""


def kept(params: Any, weights: Weights | None) -> Any:
    """A decoder's parameters, or their shapes, with the matrices of its layers in this form; None changes nothing.

    Embeddings, the head and the norms stay floats.
    """
    if weights is None:
        return params
    where = jax.tree.map(is_matrix_of_layers, params)
    return int8(params, where=where) if weights == "int8" else float24(params, where=where)


def encoder_of(leaf: Any, weights: Weights | None) -> Callable[[jax.Array], Kept] | None:
    """What puts one layer of a parameter into this form; None if the parameter stays as it is."""
    if weights is None or not is_matrix_of_layers(leaf):
        return None
    return encode_int8 if weights == "int8" else encode_float24


def is_matrix_of_layers(leaf: Any) -> bool:
    """Whether a parameter stacks the matrices of layers. Norms are stacks of vectors; embedding and head no stacks."""
    return leaf.ndim >= 3
