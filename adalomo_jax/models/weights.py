"""In which form a decoder's weights are kept between steps: the matrices of its layers in one byte, or in three."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax

from adalomo_jax.optimizers.float24 import encode as encode_float24
from adalomo_jax.optimizers.float24 import float24
from adalomo_jax.optimizers.int8 import encode as encode_int8
from adalomo_jax.optimizers.int8 import int8
from adalomo_jax.optimizers.kept import Kept, encoded

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


def make_kept(make_params: Callable[[], Any], weights: Weights | None, shardings: Any = None) -> Any:
    """The decoder's parameters that a traceable function makes, in this form.

    They are made one leaf after the other, the largest first: all at once take the memory of their floats.
    """
    shapes, treedef = jax.tree.flatten(jax.eval_shape(make_params))
    spread = [None] * len(shapes) if shardings is None else jax.tree.leaves(shardings)
    found: list[Any] = [None] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -shapes[i].size):
        make = jax.jit(lambda i=i: jax.tree.leaves(make_params())[i], out_shardings=spread[i])
        encode = encoder_of(shapes[i], weights)
        # If there is no memory for it, this raises. To ask for the address of such an array would wait for ever.
        leaf = jax.block_until_ready(make())
        found[i] = leaf if encode is None else jax.block_until_ready(encoded(leaf, encode))
    return treedef.unflatten(found)


def encoder_of(leaf: Any, weights: Weights | None) -> Callable[[jax.Array], Kept] | None:
    """What puts one layer of a parameter into this form; None if the parameter stays as it is."""
    if weights is None or not is_matrix_of_layers(leaf):
        return None
    return encode_int8 if weights == "int8" else encode_float24


def is_matrix_of_layers(leaf: Any) -> bool:
    """Whether a parameter stacks the matrices of layers. Norms are stacks of vectors; embedding and head no stacks."""
    return leaf.ndim >= 3
