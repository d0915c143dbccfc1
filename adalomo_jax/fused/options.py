"""What `fuse` can be asked for, checked before anything is traced."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from adalomo_jax.fused.loss_scale import DynamicLossScale


@dataclass(frozen=True)
class Options:
    """The options of `fuse`, explained there, where their defaults are too."""

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

    def __post_init__(self):
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, got {self.max_grad_norm}. None does not clip.")
        if self.microbatches is not None and (not isinstance(self.microbatches, int) or self.microbatches < 1):
            raise ValueError(f"microbatches must be a positive number of slices of the batch, got {self.microbatches}.")
        if self.reduction not in ("mean", "sum"):
            raise ValueError(
                "reduction is what the loss takes over the examples of a batch: it must be 'mean' or 'sum', got "
                f"{self.reduction!r}."
            )
        if self.microbatches is None and self.batch_argnums is not None:
            raise ValueError("batch_argnums names the arguments to slice into microbatches: give microbatches too.")
        if 0 in self._argnums:
            raise ValueError(
                "batch_argnums counts the arguments of loss_fn; 0 are the parameters, which no batch slices."
            )
        if not {"params", "activations"}.issuperset(self._offloaded):
            raise ValueError(
                "offload names what is kept in host memory: it must be 'params', 'activations', or a tuple of both, "
                f"got {self.offload!r}. None keeps all on the device."
            )
        if isinstance(self.loss_scale, DynamicLossScale):
            if not self.skip_nonfinite:
                raise ValueError(
                    "A dynamic loss scale finds its size by gradients that are not finite, which must not be written: "
                    "leave skip_nonfinite at True, or give loss_scale as a number."
                )
        elif self.loss_scale is not None and not self.loss_scale > 0:
            raise ValueError(f"loss_scale must be positive, got {self.loss_scale}. None does not scale.")

    @property
    def offloads_params(self) -> bool:
        """Whether stacks of matrices are kept in host memory."""
        return "params" in self._offloaded

    @property
    def offloads_activations(self) -> bool:
        """Whether what layers save for the way back is kept in host memory."""
        return "activations" in self._offloaded

    @property
    def _offloaded(self) -> tuple[str, ...]:
        return () if self.offload is None else (self.offload,) if isinstance(self.offload, str) else tuple(self.offload)

    @property
    def _argnums(self) -> tuple[int, ...]:
        argnums = self.batch_argnums
        return () if argnums is None else (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def is_batch(self, position: int) -> bool:
        """Whether an argument of the loss, counted without the parameters, is sliced into microbatches."""
        return self.microbatches is not None and (self.batch_argnums is None or position + 1 in self._argnums)
