"""AdaLomo for Optax, and training steps in which the gradients of the whole model never exist."""

from typing import TYPE_CHECKING, Any

from adalomo_jax.optimizers import MatrixAxes as MatrixAxes
from adalomo_jax.optimizers import ScaleByAdalomoState as ScaleByAdalomoState
from adalomo_jax.optimizers import adalomo as adalomo
from adalomo_jax.optimizers import apply_updates as apply_updates
from adalomo_jax.optimizers import attention_axes as attention_axes
from adalomo_jax.optimizers import lomo as lomo
from adalomo_jax.optimizers import per_layer as per_layer
from adalomo_jax.optimizers import scale_by_adalomo as scale_by_adalomo
from adalomo_jax.optimizers import scale_by_param_rms as scale_by_param_rms
from adalomo_jax.optimizers import stochastic_round as stochastic_round

if TYPE_CHECKING:
    from adalomo_jax.fused import DynamicLossScale as DynamicLossScale
    from adalomo_jax.fused import FusedState as FusedState
    from adalomo_jax.fused import FusedStep as FusedStep
    from adalomo_jax.fused import InStack as InStack
    from adalomo_jax.fused import Plan as Plan
    from adalomo_jax.fused import StepResult as StepResult
    from adalomo_jax.fused import fuse as fuse

_FUSED = ("DynamicLossScale", "FusedState", "FusedStep", "InStack", "Plan", "StepResult", "fuse")


def __getattr__(name: str) -> Any:
    """What is of `fuse` is imported when it is first named: the optimizers do without, and start sooner."""
    if name not in _FUSED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import adalomo_jax.fused

    return getattr(adalomo_jax.fused, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FUSED})
