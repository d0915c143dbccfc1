"""The families of models that a `Decoder` can be: each has a module, or shares one with its like, and a line here."""

from adalomo_jax.models.families.family import Family as Family
from adalomo_jax.models.families.gemma import GEMMA2, GEMMA3
from adalomo_jax.models.families.granite import GRANITE
from adalomo_jax.models.families.llama import LLAMA
from adalomo_jax.models.families.mistral import MISTRAL, MIXTRAL
from adalomo_jax.models.families.olmo2 import OLMO2
from adalomo_jax.models.families.phi3 import PHI3
from adalomo_jax.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from adalomo_jax.models.families.smollm3 import SMOLLM3

FAMILIES = {
    family.model_type: family
    for family in (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA2, GEMMA3, PHI3, SMOLLM3, GRANITE, OLMO2)
}
"""Families by ``model_type``. A decoder that fits several families is written as the first of them."""
