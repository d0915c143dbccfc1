"""A training run: options, text, steps, and what it leaves behind."""

from adalomo_jax.finetune.config import FinetuneConfig as FinetuneConfig
from adalomo_jax.finetune.inputs import InputError as InputError
