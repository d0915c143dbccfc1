"""Real models to run."""

from adalomo_jax.models.config import DecoderConfig as DecoderConfig
from adalomo_jax.models.config import RopeScaling as RopeScaling
from adalomo_jax.models.decoder import Decoder as Decoder
from adalomo_jax.models.decoder import decoder_of as decoder_of
from adalomo_jax.models.hugging_face import from_hugging_face as from_hugging_face
from adalomo_jax.models.hugging_face import to_hugging_face as to_hugging_face
from adalomo_jax.models.loss import count_targets as count_targets
from adalomo_jax.models.loss import next_token_loss as next_token_loss
from adalomo_jax.models.presets import PRESETS as PRESETS
from adalomo_jax.models.sampling import generate as generate
from adalomo_jax.models.sharding import batch_sharding as batch_sharding
from adalomo_jax.models.sharding import make_mesh as make_mesh
from adalomo_jax.models.sharding import param_shardings as param_shardings

Llama, LlamaConfig, llama_of = Decoder, DecoderConfig, decoder_of
"""The names that these had before other families were added."""
