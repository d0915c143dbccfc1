"""Kernels with an axis for heads, and the matrices that they stand for."""

import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from adalomo_jax import MatrixAxes

LR = 0.1


class Layout(NamedTuple):
    """The letters of a kernel's and its matrix's axes: D is the width, N and K are heads, H is a head's width."""

    kernel: str
    batch: str
    rows: str
    columns: str

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        return tuple(sizes[letter] for letter in self.kernel)

    def matrix(self, x: Any) -> np.ndarray:
        order = [self.kernel.index(letter) for letter in self.batch + self.rows + self.columns]
        x, sizes = np.asarray(x).transpose(order), dict(zip(self.kernel, np.shape(x)))
        product = lambda letters: math.prod(sizes[letter] for letter in letters)
        return x.reshape(*(sizes[b] for b in self.batch), product(self.rows), product(self.columns))

    def factor(self, x: Any, name: str) -> np.ndarray:
        """``v_row`` or ``v_col`` of the matrix."""
        side, other = (self.rows, self.columns) if name == "v_row" else (self.columns, self.rows)
        kept = [letter for letter in self.kernel if letter not in other]
        x = np.transpose(x, [kept.index(letter) for letter in self.batch + side])
        return x.reshape(*x.shape[: len(self.batch)], -1)


DNH, NHD = Layout("DNH", "", "D", "NH"), Layout("NHD", "", "NH", "D")
QUERY, OUT = MatrixAxes(0, (1, 2)), MatrixAxes(rows=(0, 1), columns=2)
"""The matrix axes of these two layouts."""


def gaussian(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random numbers in rows of different sizes, so that row statistics matter."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-3, 3, shape[:-1] + (1,))).astype(np.float32)


def nested(by_path: dict[str, Any]) -> Any:
    tree: Any = {}
    for path, x in by_path.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = x
    return tree


def by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
