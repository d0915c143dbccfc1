"""AdaLomo and LOMO in float64 NumPy, from the papers' equations.

AdaLomo is algorithm 1 of https://arxiv.org/abs/2310.10195, with its sums over rows and columns and an explicit ``v``:

    r = beta r + (1 - beta) g**2 1_n            c = beta c + (1 - beta) 1_m^T g**2
    v = r c / (1_m^T r)                         u = g / sqrt(v)
    u' = u / max(1, RMS(u)) * max(floor, RMS(theta))
    theta = theta - lr u'

The reference also has what the official code adds: ``beta_t = 1 - t**-0.8``, ``g**2 + eps``, a decay of
``lr * max(floor, RMS(theta)) * weight_decay``, and an unfactored ``v`` for tensors of rank 0 and 1.
"""

from typing import Any, NamedTuple

import numpy as np


class Adalomo(NamedTuple):
    """The constants of the rule."""

    decay_rate: float = 0.8
    b2: float | None = None
    clipping_threshold: float = 1.0
    eps: float = 1e-30
    min_param_rms: float = 1e-3
    weight_decay: float = 0.0


DEFAULT = Adalomo()


def root_mean_square(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.ravel()) / np.sqrt(x.size))


def init(theta: np.ndarray) -> Any:
    """``(r, c)``, or ``v`` for a tensor of rank 0 or 1."""
    if theta.ndim < 2:
        return np.zeros(theta.shape)
    return np.zeros(theta.shape[:-1]), np.zeros(theta.shape[:-2] + theta.shape[-1:])


def adalomo_step(theta: Any, g: Any, moment: Any, t: int, lr: float, rule: Adalomo = DEFAULT) -> tuple[Any, Any]:
    """``theta`` and the moment after step ``t = 1, 2, ...``."""
    theta, g = np.asarray(theta, np.float64), np.asarray(g, np.float64)
    beta = 1 - float(t) ** -rule.decay_rate if rule.b2 is None else rule.b2
    s = g**2 + rule.eps
    if theta.ndim < 2:
        v = moment = beta * moment + (1 - beta) * s
    else:
        r = beta * moment[0] + (1 - beta) * np.einsum("...mn->...m", s)
        c = beta * moment[1] + (1 - beta) * np.einsum("...mn->...n", s)
        v = np.einsum("...m,...n->...mn", r, c) / np.einsum("...m->...", r)[..., None, None]
        moment = r, c
    u = g / np.sqrt(v)
    u = u / max(1.0, root_mean_square(u) / rule.clipping_threshold)
    a = lr * max(rule.min_param_rms, root_mean_square(theta))
    return theta * (1 - a * rule.weight_decay) - a * u, moment


def means(moment: Any, shape: tuple[int, ...]) -> Any:
    """The moment of a tensor of this shape, with `adalomo_step`'s sums turned into the means that the library keeps."""
    return moment if len(shape) < 2 else (moment[0] / shape[-1], moment[1] / shape[-2])


def lomo_step(theta: Any, g: Any, lr: float, *, clip_value: float = np.inf, weight_decay: float = 0.0) -> np.ndarray:
    theta, g = np.asarray(theta, np.float64), np.asarray(g, np.float64)
    return theta * (1 - lr * weight_decay) - lr * np.minimum(np.maximum(g, -clip_value), clip_value)
