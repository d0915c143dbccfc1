"""Options that choose leaves of the parameters: by a function of a path, or by a tree of bools."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def chosen_leaves(option: str, choice: Any, paths: Sequence[str], treedef: Any) -> list[bool]:
    """Whether each leaf is chosen.

    Args:
      option: the option's name, for errors.
      choice: a function of a path such as ``"layers/up"``, or a tree of bools, or a prefix of one.
      paths: the path of each leaf.
      treedef: the structure of the parameters.

    Raises:
      ValueError: the function returns something else than a bool, or the tree is not like the parameters.
    """
    if callable(choice):
        return [_answer(option, choice, path) for path in paths]
    try:
        flags = jax.tree.leaves(jax.tree.broadcast(choice, treedef.unflatten([0] * treedef.num_leaves)))
    except ValueError as error:
        raise ValueError(f"{option} must be a tree like params, or a prefix of it, of bools. {error}") from error
    return list(map(bool, flags))


def _answer(option: str, choice: Any, path: str) -> bool:
    answer = choice(path)
    if not is_bool(answer):
        raise ValueError(f"{option} must return True or False of a path, but of {path!r} it returned {shown(answer)}.")
    return bool(answer)


def is_bool(x: Any) -> bool:
    """Whether it is True or False, as a Python bool or an array."""
    is_array = getattr(x, "shape", None) == () and jnp.issubdtype(getattr(x, "dtype", type(x)), np.bool_)
    return isinstance(x, (bool, np.bool_)) or is_array


def shown(value: Any) -> str:
    """A value as one short line."""
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
