"""The memory that a training step needs, and whether it fits, as a chip's compiler says without the chip."""

from adalomo_jax.memory.compile import compile_usage as compile_usage
from adalomo_jax.memory.estimate import estimate_usage as estimate_usage
from adalomo_jax.memory.targets import TARGETS as TARGETS
from adalomo_jax.memory.targets import Target as Target
from adalomo_jax.memory.targets import Unavailable as Unavailable
from adalomo_jax.memory.targets import devices_of as devices_of
from adalomo_jax.memory.targets import prepare as prepare
from adalomo_jax.memory.usage import Usage as Usage
