"""AdaLomo for Optax, and training steps in which the gradients of the whole model never exist.

Here are the parts that need JAX and Optax alone:

- ``adalomo``, ``lomo``, ``scale_by_adalomo``, ``scale_by_param_rms``: the rules, as Optax transformations.
- ``fuse(loss_fn, tx)``: a training step that updates each layer while the gradients flow back. ``FusedStep``,
  ``FusedState``, ``StepResult``, ``Plan``, ``InStack`` and ``DynamicLossScale`` are what it takes and returns.
- ``apply_updates``, ``stochastic_round``: narrow weights, rounded so that small steps are not lost.
- ``int8``, ``float24``, ``floats``: weights in one byte or three, which ``fuse`` trains as they are.
- ``per_layer``, ``MatrixAxes``, ``attention_axes``: what one tensor is, in a stack of layers or a kernel of rank 3.

The modules around them:

- ``adalomo_jax.linen`` and ``adalomo_jax.nnx``: the step in Flax's training loops.
- ``adalomo_jax.models``: the Llama that the commands train, its attention and its loss.
- ``adalomo_jax.pretrained``: checkpoints and tokenizers of Hugging Face and llama.cpp.
- ``adalomo_jax.memory``: what a step needs on a chip, by that chip's compiler.
- ``adalomo-jax``, or ``python -m adalomo_jax``: the commands finetune, generate, plot, memory and bench.
"""

TYPE_CHECKING = False  # typing takes a while to import, in which the commands would not hear Ctrl-C as they should
if TYPE_CHECKING:
    from adalomo_jax.fused import DynamicLossScale as DynamicLossScale
    from adalomo_jax.fused import FusedState as FusedState
    from adalomo_jax.fused import FusedStep as FusedStep
    from adalomo_jax.fused import InStack as InStack
    from adalomo_jax.fused import Plan as Plan
    from adalomo_jax.fused import StepResult as StepResult
    from adalomo_jax.fused import fuse as fuse
    from adalomo_jax.optimizers import Float24 as Float24
    from adalomo_jax.optimizers import Int8 as Int8
    from adalomo_jax.optimizers import MatrixAxes as MatrixAxes
    from adalomo_jax.optimizers import ScaleByAdalomoState as ScaleByAdalomoState
    from adalomo_jax.optimizers import adalomo as adalomo
    from adalomo_jax.optimizers import apply_updates as apply_updates
    from adalomo_jax.optimizers import attention_axes as attention_axes
    from adalomo_jax.optimizers import float24 as float24
    from adalomo_jax.optimizers import floats as floats
    from adalomo_jax.optimizers import int8 as int8
    from adalomo_jax.optimizers import lomo as lomo
    from adalomo_jax.optimizers import per_layer as per_layer
    from adalomo_jax.optimizers import scale_by_adalomo as scale_by_adalomo
    from adalomo_jax.optimizers import scale_by_param_rms as scale_by_param_rms
    from adalomo_jax.optimizers import stochastic_round as stochastic_round

_FUSED = ("DynamicLossScale", "FusedState", "FusedStep", "InStack", "Plan", "StepResult", "fuse")
_OPTIMIZERS = (
    *("Float24", "Int8", "MatrixAxes", "ScaleByAdalomoState", "adalomo", "apply_updates", "attention_axes"),
    *("float24", "floats", "int8", "lomo", "per_layer", "scale_by_adalomo", "scale_by_param_rms", "stochastic_round"),
)


def __getattr__(name: str) -> object:
    """What is offered is imported when it is first named: optimizers do without the engine, and commands start soon."""
    if name in _FUSED:
        import adalomo_jax.fused as home
    elif name in _OPTIMIZERS:
        import adalomo_jax.optimizers as home
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FUSED, *_OPTIMIZERS})
