"""The options of `fuse`, checked before anything is traced."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adalomo_jax.fused.loss_scale import DynamicLossScale
from adalomo_jax.fused.plan.runs import FEWEST
from adalomo_jax.optimizers.choice import is_bool, shown


class Range(NamedTuple):
    """The values that an option may have."""

    holds: Callable[[Any], bool]
    due: str
    """What the value must be."""
    way_out: str = ""


def check_option(name: str, value: Any, allowed: Range) -> None:
    """Refuses a value that is out of range."""
    if not allowed.holds(value):
        raise ValueError(f"{name} must be {allowed.due}, got {shown(value)}. {allowed.way_out}".rstrip())


def _is_number(x: Any) -> bool:
    """Whether it is one real number, as a Python number or an array; a bool is not."""
    if isinstance(x, (np.generic, np.ndarray, jax.Array)):
        return x.ndim == 0 and (_is_of(x, np.floating) or _is_of(x, np.integer))
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_whole(x: Any) -> bool:
    return _is_number(x) and (isinstance(x, int) or _is_of(x, np.integer))


def _is_of(x: Any, kind: Any) -> bool:
    return jnp.issubdtype(getattr(x, "dtype", type(x)), kind)


def _is_positive(x: Any) -> bool:
    return _is_number(x) and bool(x > 0)


def _is_finite(x: Any) -> bool:
    return _is_positive(x) and math.isfinite(x)


def _is_count(x: Any) -> bool:
    return _is_whole(x) and bool(x >= 1)


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: x is None or holds(x)


def _all_of(holds: Callable[[Any], bool], x: Any) -> bool:
    """Whether it holds for one value, or for each value in a tuple."""
    return all(map(holds, x)) if isinstance(x, (tuple, list)) else holds(x)


_FLAG = Range(is_bool, "True or False")

_TX = Range(
    lambda tx: callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None)),
    "an optax.GradientTransformation",
    "Call the function that makes it: fuse(loss_fn, adalomo(1e-3)).",
)

OPTIONS = {
    "has_aux": _FLAG,
    "trainable": Range(
        lambda x: callable(x) or all(map(is_bool, jax.tree.leaves(x))),
        "a tree of bools like params, a prefix of it, or a function of a path",
        "None trains all floats.",
    ),
    "max_grad_norm": Range(_or_none(_is_positive), "positive", "None does not clip."),
    "microbatches": Range(_or_none(_is_count), "a positive number of slices of the batch"),
    "reduction": Range(
        lambda x: isinstance(x, str) and x in ("mean", "sum"),
        "'mean' or 'sum'",
        "It says how the loss combines the examples of a batch.",
    ),
    "batch_argnums": Range(
        _or_none(lambda x: _all_of(_is_count, x)),
        "a position among the arguments of loss_fn, from 1 on, or a tuple of them",
        "0 is the parameters, which are never sliced.",
    ),
    "loss_scale": Range(
        _or_none(lambda x: isinstance(x, DynamicLossScale) or _is_finite(x)),
        "positive and finite, or a DynamicLossScale",
        "None does not scale.",
    ),
    "skip_nonfinite": _FLAG,
    "rms_metrics": _FLAG,
    "strict": _FLAG,
    "stochastic_rounding": Range(_or_none(is_bool), "True, False or None"),
    "seed": Range(lambda x: _is_whole(x) and bool(0 <= x < 2**32), "a whole number from 0 to 2**32 - 1"),
    "offload": Range(
        _or_none(lambda x: _all_of(lambda kind: isinstance(kind, str) and kind in ("params", "activations"), x)),
        "'params', 'activations', or a tuple of both",
        "It names what stays in host memory; None keeps all on the device.",
    ),
    "roll": Range(
        lambda x: is_bool(x) or (_is_whole(x) and bool(x >= FEWEST)),
        f"True, False, or a whole number of layers, from {FEWEST} on",
        "A number stacks all lists of that many layers.",
    ),
}
"""The range of each option, by name."""

_DYNAMIC_LOSS_SCALE = {
    "initial": Range(_is_finite, "positive and finite"),
    "growth_interval": Range(_is_count, "a positive number of steps"),
    "factor": Range(lambda x: _is_finite(x) and bool(x > 1), "above 1 and finite"),
    "smallest": Range(_is_finite, "positive and finite"),
    "largest": Range(_is_finite, "positive and finite"),
}


def check_loss_and_tx(loss_fn: Any, tx: Any) -> None:
    """Refuses a loss that is not a function, or a ``tx`` that is not a transformation."""
    check_option("loss_fn", loss_fn, Range(callable, "a function: loss_fn(params, *args) returns the loss"))
    check_option("tx", tx, _TX)


@dataclass(frozen=True)
class Options:
    """The options of `fuse`, which explains them and sets their defaults."""

    has_aux: bool
    trainable: Any | Callable[[str], bool]
    max_grad_norm: float | None
    microbatches: int | None
    reduction: Literal["mean", "sum"]
    batch_argnums: int | tuple[int, ...] | None
    loss_scale: float | DynamicLossScale | None
    skip_nonfinite: bool
    rms_metrics: bool
    strict: bool
    stochastic_rounding: bool | None
    seed: int
    offload: str | tuple[str, ...] | None
    roll: bool | int

    def __post_init__(self):
        for name, allowed in OPTIONS.items():
            check_option(name, getattr(self, name), allowed)
        if self.microbatches is None and self.batch_argnums is not None:
            raise ValueError("batch_argnums names the arguments to slice into microbatches: give microbatches too.")
        if isinstance(self.loss_scale, DynamicLossScale):
            _check_dynamic(self.loss_scale)
            if not self.skip_nonfinite:
                raise ValueError(
                    "A dynamic loss scale finds its size by gradients that are not finite, which must not be written: "
                    "leave skip_nonfinite at True, or give loss_scale as a number."
                )

    @property
    def offloads_params(self) -> bool:
        """Whether stacks of matrices are kept in host memory."""
        return "params" in self._offloaded

    @property
    def offloads_activations(self) -> bool:
        """Whether the residuals of layers are kept in host memory."""
        return "activations" in self._offloaded

    @property
    def _offloaded(self) -> tuple[str, ...]:
        return () if self.offload is None else (self.offload,) if isinstance(self.offload, str) else tuple(self.offload)

    @property
    def argnums(self) -> tuple[int, ...]:
        """`batch_argnums`, as a tuple."""
        argnums = self.batch_argnums
        return () if argnums is None else tuple(argnums) if isinstance(argnums, (tuple, list)) else (argnums,)

    def is_batch(self, position: int) -> bool:
        """Whether an argument of the loss, counted without the parameters, is sliced into microbatches."""
        return self.microbatches is not None and (self.batch_argnums is None or position + 1 in self.argnums)


def _check_dynamic(scale: DynamicLossScale) -> None:
    for name, allowed in _DYNAMIC_LOSS_SCALE.items():
        check_option(f"loss_scale.{name}", getattr(scale, name), allowed)
    if not scale.smallest <= scale.initial <= scale.largest:
        raise ValueError(
            f"loss_scale.initial must be from smallest to largest, {scale.smallest} to {scale.largest}, "
            f"got {scale.initial}."
        )
