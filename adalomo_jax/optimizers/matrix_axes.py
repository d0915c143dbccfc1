"""Which axes of each parameter are the rows and the columns of its matrix.

Many libraries keep the matrices of attention with an axis for the heads: ``[D, N, H]`` is ``[D, N * H]``. Factoring it
over its last two axes would factor each entry of D by itself. That is another rule, with a state of ``1/N + 1/H`` of
the tensor's entries.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from adalomo_jax.optimizers.layer_axes import LayerKey, Path, entries_of_leaves
from adalomo_jax.optimizers.sums import LAST_TWO, Axes


class MatrixAxes(NamedTuple):
    """The axes of a tensor that are the rows of a matrix, and those that are its columns; the rest are batch axes."""

    rows: int | Sequence[int] = -2
    """One axis, or several."""
    columns: int | Sequence[int] = -1
    """One axis, or several."""


MatrixAxesOption = Any | Callable[[str, tuple[int, ...]], MatrixAxes | None] | None
"""A tree (or a prefix of one) of the axes of each leaf, or None; a function of path and shape; or "attention"."""

ATTENTION_KERNELS = {
    # Flax's attention of Linen and NNX, MaxText.
    "query/kernel": "DNH",
    "key/kernel": "DNH",
    "value/kernel": "DNH",
    "out/kernel": "NHD",
    "qkv_proj/kernel": "D3NH",
    # tunix: Llama, Qwen.
    "q_proj/w": "DNH",
    "k_proj/w": "DNH",
    "v_proj/w": "DNH",
    "o_proj/w": "NHD",
    # Gemma, in tunix and in DeepMind's own library.
    "q_einsum/w": "NDH",
    "k_einsum/w": "NDH",
    "kv_einsum/w": "2NDH",
    "qkv_einsum/w": "3NDH",
    "attn_vec_einsum/w": "NHD",
}
"""Maps the end of a parameter's path to its last axes: the width D of the model, N heads, the width H of a head.

Other letters are batch axes, such as the axis of keys and values in one array. So are axes before these, such as the
layer axis of a stack.
"""

_NAMED_BY_OTHERS_TOO = {"out/kernel"}
"""Count as attention's only if they are the whole model, or within a module that is named attention."""

_ATTENTION = re.compile("attn|attention|mha|multi_?head", re.IGNORECASE)

_HEADS_OVER_WIDTH = 4
"""The largest ratio of all heads' width to the model's: Gemma's is up to 2, that of a stack of matrices far larger."""


def attention_axes(path: str, shape: tuple[int, ...]) -> MatrixAxes | None:
    """The axes of an attention kernel that has an axis for heads, as Flax, MaxText, tunix and Gemma keep it.

    It is known by the end of its path (``ATTENTION_KERNELS``) and by its shape: all heads together are at most four
    times as wide as the model, and one of several heads is narrower than the model. So a stack of matrices
    ``[L, D, F]`` or a convolution with such a name does not count as one. ``out/kernel`` must be within a module named
    attention (``attn``, ``mha``, ``MultiHead...``), or in a model that is nothing else.

    Args:
      path: such as ``"layers/attn/query/kernel"``; in an ``nnx.State``, it ends in ``/value``.
      shape: the parameter's shape; in a stack, the shape of one layer.

    Returns:
      The axes, or None for any other parameter.

    Example:
      >>> from adalomo_jax.optimizers import attention_axes
      >>> attention_axes("layers_0/attention/query/kernel", (512, 8, 64))
      MatrixAxes(rows=(-3,), columns=(-2, -1))
      >>> attention_axes("layers_0/mlp/kernel", (512, 8, 64)) is None
      True
    """
    *outer, module, name = ["", *path.removesuffix("/value").split("/")]
    letters = ATTENTION_KERNELS.get(f"{module}/{name}")
    if letters is None or len(shape) < len(letters):
        return None
    is_alone = set(outer) <= {"", "params"}
    if f"{module}/{name}" in _NAMED_BY_OTHERS_TOO and not (is_alone or any(map(_ATTENTION.search, outer))):
        return None
    D, N, H = (letters.index(letter) - len(letters) for letter in "DNH")
    if shape[N] * shape[H] > _HEADS_OVER_WIDTH * shape[D] or (shape[H] >= shape[D] and shape[N] > 1):
        return None
    return MatrixAxes(rows=(N, H), columns=(D,)) if D == -1 else MatrixAxes(rows=(D,), columns=(N, H))


def check_matrix_axes(matrix_axes: MatrixAxesOption) -> None:
    """Refuses anything but a tree of axes, a function or "attention"."""
    if not (callable(matrix_axes) or _is_named(matrix_axes)):
        _entries_of(matrix_axes)


def matrix_axes_of_leaves(params: optax.Params, matrix_axes: MatrixAxesOption) -> list[Axes]:
    """The axes of each leaf as tuples; the last two if the option gives none (for a vector, nobody reads them)."""
    leaves = [(path, tuple(leaf.shape)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    if callable(matrix_axes) or _is_named(matrix_axes):
        axes_of = matrix_axes if callable(matrix_axes) else attention_axes
        found = [_asked(axes_of, leaf_name(path), shape) for path, shape in leaves]
    else:
        found = entries_of_leaves("matrix_axes", params, _entries_of(matrix_axes), "its MatrixAxes")
    return [
        LAST_TWO if axes is None else _as_tuples(axes, leaf_name(path), shape)
        for axes, (path, shape) in zip(found, leaves, strict=True)
    ]


def leaf_name(path: Path) -> str:
    """A parameter's path, its entries joined by slashes."""
    return jax.tree_util.keystr(tuple(key for key in path if not isinstance(key, LayerKey)), simple=True, separator="/")


def factor_shapes(shape: tuple[int, ...], axes: Axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of ``v_row`` and ``v_col``: all axes except the columns, and all except the rows."""
    shape_but = lambda side: tuple(n for k, n in enumerate(shape) if not {k, k - len(shape)} & {*side})
    rows, columns = axes
    return shape_but(columns), shape_but(rows)


def _is_named(matrix_axes: Any) -> bool:
    return isinstance(matrix_axes, str) and matrix_axes == "attention"


def _is_axes(x: Any) -> bool:
    """Whether this is a ``MatrixAxes``, or Optax's dimension numbers for Muon, which say the same."""
    return isinstance(x, MatrixAxes) or getattr(x, "_fields", None) == ("reduction_axis", "output_axis")


def _entries_of(matrix_axes: Any) -> dict[Path, Any]:
    by_path = dict(jax.tree_util.tree_leaves_with_path(matrix_axes, is_leaf=lambda x: x is None or _is_axes(x)))
    for path, axes in by_path.items():
        _check_is_axes(f"matrix_axes{jax.tree_util.keystr(path)}", axes)
    return by_path


def _asked(axes_of: Callable[[str, tuple[int, ...]], Any], name: str, shape: tuple[int, ...]) -> Any:
    axes = axes_of(name, shape)
    _check_is_axes(f"The result of matrix_axes for {name!r} {shape}", axes)
    return axes


def _check_is_axes(name: str, axes: Any) -> None:
    if axes is not None and not _is_axes(axes):
        raise ValueError(
            f"{name} must be MatrixAxes(rows, columns), or None for the last two axes, got {axes!r}. The option is a "
            'tree of them like the parameters, a function of path and shape that returns one, or "attention".'
        )


def _as_tuples(axes: Any, name: str, shape: tuple[int, ...]) -> Axes:
    """The axes, checked, as tuples of non-negative numbers."""
    if len(shape) < 2:
        raise ValueError(f"matrix_axes of {name!r} must be None: its shape {shape} is no matrix's, got {axes}.")
    sides = [(side,) if isinstance(side, (int, np.integer)) else side for side in axes]
    is_axis = lambda k: isinstance(k, (int, np.integer)) and not isinstance(k, bool) and -len(shape) <= k < len(shape)
    are_axes = all(isinstance(side, Sequence) and side and all(map(is_axis, side)) for side in sides)
    rows, columns = (tuple(int(k) % len(shape) for k in side) if are_axes else () for side in sides)
    if not are_axes or len({*rows, *columns}) < len(rows) + len(columns):
        raise ValueError(
            f"matrix_axes of {name!r} must be axes of its shape {shape}, at least one for rows, one for columns and "
            f"none twice, got {axes}. None is the last two."
        )
    return rows, columns
