"""Models as others write them, in each framework's usual style: functions of their sizes, by name."""

import models_bodies
import models_jax
import models_linen
import models_nnx

MODELS = models_linen.MODELS | models_nnx.MODELS | models_jax.MODELS | models_bodies.MODELS
