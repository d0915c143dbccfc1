"""The paths of parameters in their tree, and of arrays in any tree."""

from typing import Any

import jax

from adalomo_jax.optimizers.kept import is_kept


def path_name(path: Any) -> str:
    """A parameter's path, as plans print it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_with_paths(tree: Any) -> list[tuple[Any, Any]]:
    """Pairs of a path and the leaf at that path. A weight in another form is one leaf."""
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_kept)
