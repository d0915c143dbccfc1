"""The table of update rules that the commands offer: a new rule is a file in `optimizers`, and a line here.

The table lies beside `optimizers` and not in it: its names are options, and ``--help`` is quick without JAX.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import optax


class Rule(NamedTuple):
    """An update rule."""

    name: str
    constructor: str
    """Its module and its name there. It takes the learning rate, and the weight decay by name."""
    random_rate: float
    """A peak learning rate that suits the tiny model from random weights."""
    tuned_rate: float
    """One to start from if weights are trained further: the best of examples/further_pretraining.py. That of lomo is
    for gradients that are not clipped; clipping was not compared."""
    description: str
    """What it is, for those who know Optax."""
    from_optax: bool = False
    """Comparisons show it as Optax's users run it, unfused; ours are shown fused."""

    def make(self, learning_rate: float | optax.Schedule, weight_decay: float = 0.0) -> optax.GradientTransformation:
        """The transformation. Its moments are float32, whatever the weights are."""
        return pkgutil.resolve_name(self.constructor)(learning_rate, weight_decay=weight_decay)


_RULES = (
    Rule("adalomo", "adalomo_jax.optimizers:adalomo", 3e-2, 1e-3, "Adafactor's arithmetic without momentum, per layer"),
    Rule("adafactor", "adalomo_jax.optimizers.optax_rules:adafactor", 3e-2, 1e-3, "Optax's, in float32", True),
    Rule("adamw", "adalomo_jax.optimizers.optax_rules:adamw", 3e-3, 2e-4, "Adam with two float32 moments", True),
    Rule("lomo", "adalomo_jax.optimizers:lomo", 3e-1, 1e-2, "plain SGD"),
)
RULES = {rule.name: rule for rule in _RULES}
"""By name."""

HELP = "Update rule: " + "; ".join(f"{rule.name}, {rule.description}" for rule in _RULES)
"""The help of the option that names a rule."""
RATES = "; ".join(f"{rule.name} {rule.tuned_rate:g}" for rule in _RULES) + "; more from random weights"
"""The default learning rates, as help shows them."""

if TYPE_CHECKING:
    Optimizer = str
else:
    Optimizer = Literal[tuple(RULES)]
