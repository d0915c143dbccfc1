"""When parameters are updated: layer by layer, while the gradients flow back."""

from adalomo_jax.fused.loss_scale import DynamicLossScale as DynamicLossScale
from adalomo_jax.fused.loss_scale import LossScaleState as LossScaleState
from adalomo_jax.fused.plan.call_signature import Signature as Signature
from adalomo_jax.fused.plan.placed_tree import InStack as InStack
from adalomo_jax.fused.plan.plan import LeafPlan as LeafPlan
from adalomo_jax.fused.plan.plan import Plan as Plan
from adalomo_jax.fused.result import StepResult as StepResult
from adalomo_jax.fused.state import FusedState as FusedState
from adalomo_jax.fused.step import FusedStep as FusedStep
from adalomo_jax.fused.transform import fuse as fuse
