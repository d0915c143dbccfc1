"""Real models to run."""

from adalomo_jax.models.config import PRESETS as PRESETS
from adalomo_jax.models.config import LlamaConfig as LlamaConfig
from adalomo_jax.models.config import RopeScaling as RopeScaling
from adalomo_jax.models.hugging_face import from_hugging_face as from_hugging_face
from adalomo_jax.models.hugging_face import to_hugging_face as to_hugging_face
from adalomo_jax.models.llama import Llama as Llama
from adalomo_jax.models.llama import llama_of as llama_of
from adalomo_jax.models.loss import count_targets as count_targets
from adalomo_jax.models.loss import next_token_loss as next_token_loss
from adalomo_jax.models.sampling import generate as generate
from adalomo_jax.models.sharding import batch_sharding as batch_sharding
from adalomo_jax.models.sharding import make_mesh as make_mesh
from adalomo_jax.models.sharding import param_shardings as param_shardings
