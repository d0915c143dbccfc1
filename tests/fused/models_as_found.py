"""Models as somebody else wrote them, in each framework's usual manner: functions of their sizes, by name."""

import models_bodies
import models_jax
import models_linen
import models_nnx

MODELS = models_linen.MODELS | models_nnx.MODELS | models_jax.MODELS | models_bodies.MODELS
