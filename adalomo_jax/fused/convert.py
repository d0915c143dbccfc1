"""Converts a step's state for unstacked layers to one for stacked layers, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

from adalomo_jax.fused.plan.placed_tree import layer_of, stack
from adalomo_jax.fused.plan.tracing import Traced
from adalomo_jax.fused.state import FusedState
from adalomo_jax.optimizers.per_layer import PerLayer


def state_of_stacks(state: FusedState, unplaced: Traced, placed: Traced, layers: Sequence[Sequence[int]]) -> FusedState:
    """The state for placed parameters.

    Args:
      state: the state for unplaced parameters.
      unplaced: a call with the unplaced parameters.
      placed: a call with the placed parameters.
      layers: for each placed parameter, the positions of its layers among the unplaced ones.
    """
    own = _by_owner(unplaced.optimizer, state.inner)

    def make(owner: int, rank: int) -> Any:
        of_layers = [own[i, rank] for i in layers[owner]]
        return of_layers[0] if len(of_layers) == 1 else stack(of_layers)

    return _converted(state, unplaced, placed, make)


def state_of_layers(state: FusedState, unplaced: Traced, placed: Traced, layers: Sequence[Sequence[int]]) -> FusedState:
    """The state for unplaced parameters, given the state for placed ones; arguments as in `state_of_stacks`."""
    own = _by_owner(placed.optimizer, state.inner)
    place = {i: (p, layer, len(of_leaf)) for p, of_leaf in enumerate(layers) for layer, i in enumerate(of_leaf)}

    def make(owner: int, rank: int) -> Any:
        p, layer, n = place[owner]
        return own[p, rank] if n == 1 else layer_of(own[p, rank], layer)

    return _converted(state, placed, unplaced, make)


def _converted(state: FusedState, source: Traced, target: Traced, make: Any) -> FusedState:
    shared = source.optimizer.shared(state.inner)
    owns = [[make(*key) for key in _keys(target.optimizer, group)] for group in target.optimizer.groups]
    return state._replace(inner=target.optimizer.assemble(shared, owns), signature=target.signature)


def _by_owner(optimizer: PerLayer, inner: Any) -> Mapping[tuple[int, int], Any]:
    """The state's leaves, by the parameter that each is kept for and its position among that parameter's leaves."""
    found = {}
    for group in optimizer.groups:
        found |= zip(_keys(optimizer, group), optimizer.own(inner, group), strict=True)
    return found


def _keys(optimizer: PerLayer, group: Any) -> list[tuple[int, int]]:
    keys: list[tuple[int, int]] = []
    for owner in optimizer.owners(group):
        if owner is None:
            raise ValueError(
                "tx keeps one array for several parameters, which cannot be converted layer by layer. Make a new state "
                "with step.init(params, *args)."
            )
        keys.append((owner, sum(of == owner for of, _ in keys)))
    return keys
