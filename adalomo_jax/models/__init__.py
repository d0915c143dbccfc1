"""Real models to run."""

from adalomo_jax.models.config import PRESETS as PRESETS
from adalomo_jax.models.config import LlamaConfig as LlamaConfig
from adalomo_jax.models.llama import Llama as Llama
from adalomo_jax.models.loss import next_token_loss as next_token_loss
from adalomo_jax.models.sampling import generate as generate
