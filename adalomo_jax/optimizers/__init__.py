"""How one tensor is updated, by AdaLomo and LOMO for Optax, and in which form its weights are kept."""

from adalomo_jax.optimizers.adalomo import ScaleByAdalomoState as ScaleByAdalomoState
from adalomo_jax.optimizers.adalomo import adalomo as adalomo
from adalomo_jax.optimizers.adalomo import scale_by_adalomo as scale_by_adalomo
from adalomo_jax.optimizers.adalomo import scale_by_param_rms as scale_by_param_rms
from adalomo_jax.optimizers.float24 import Float24 as Float24
from adalomo_jax.optimizers.float24 import float24 as float24
from adalomo_jax.optimizers.int8 import Int8 as Int8
from adalomo_jax.optimizers.int8 import int8 as int8
from adalomo_jax.optimizers.kept import floats as floats
from adalomo_jax.optimizers.lomo import lomo as lomo
from adalomo_jax.optimizers.matrix_axes import MatrixAxes as MatrixAxes
from adalomo_jax.optimizers.matrix_axes import attention_axes as attention_axes
from adalomo_jax.optimizers.per_layer import per_layer as per_layer
from adalomo_jax.optimizers.rounding import apply_updates as apply_updates
from adalomo_jax.optimizers.rounding import stochastic_round as stochastic_round
