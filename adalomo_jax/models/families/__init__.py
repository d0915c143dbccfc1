"""The families of models that a `Decoder` can be: each has a module, and a line here."""

from adalomo_jax.models.families.family import Family as Family
from adalomo_jax.models.families.llama import LLAMA
from adalomo_jax.models.families.mistral import MISTRAL
from adalomo_jax.models.families.qwen2 import QWEN2

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2)}
"""Families by ``model_type``. A decoder that fits several families is written as the first of them."""
