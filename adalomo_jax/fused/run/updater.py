"""The optimizer's step on some tensors: it scales their gradients, asks `tx`, and writes the result, or does not."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from adalomo_jax.barriers import each_known
from adalomo_jax.fused.run.in_place import Part, UpdateLayer, layer_at, start, update
from adalomo_jax.fused.sharding import Sharding, constrain, of_stack
from adalomo_jax.optimizers.kept import as_floats, is_kept
from adalomo_jax.optimizers.moments import rms
from adalomo_jax.optimizers.per_layer import Group, PerLayer
from adalomo_jax.optimizers.precision import promoted
from adalomo_jax.optimizers.rounding import apply_update

_BEYOND = 2.0**-96
"""A finite float32 times this never has a square that overflows, and none whose own square overflows becomes 0."""


class Squares(NamedTuple):
    """The sum of the squares of the entries of some gradients, float32; of stacks, with a leading layer axis."""

    plain: jax.Array
    """Also not finite if an entry is above 1.8e19."""
    scaled: jax.Array
    """The sum for the gradients times 2**-96: not finite only if they are not. Infinity if it was not asked for."""

    def norm(self) -> jax.Array:
        """The root of the sum over layers."""
        plain, scaled = jnp.sum(self.plain), jnp.sum(self.scaled)
        return jnp.where(jnp.isfinite(plain), jnp.sqrt(plain), jnp.sqrt(scaled) / _BEYOND)


class Statistics(NamedTuple):
    """Statistics of the update of some tensors; for stacks, with a leading layer axis."""

    squares: Squares
    """The squares of their gradients."""
    written: jax.Array
    """Whether each tensor was updated."""
    update_rms: list[jax.Array]
    """The RMS of each tensor's update, if asked for."""
    param_rms: list[jax.Array]
    """The RMS of each tensor before the update, if asked for."""


@dataclass(frozen=True)
class Updater:
    """Takes the optimizer's step on some tensors, and writes the updates to their weights."""

    optimizer: PerLayer
    axes: tuple[int | None, ...]
    """The layer axis of each leaf."""
    shared: list[Any]
    """The optimizer's state that belongs to no parameter, before the step."""
    keys: tuple[jax.Array | None, ...]
    """The key for rounding each leaf's weights; None rounds to nearest."""
    unscale: jax.Array | None = None
    """The factor on gradients that undoes the scale of the loss."""
    clip: jax.Array | None = None
    """A further factor on gradients that bounds their norm."""
    proceed: jax.Array | None = None
    """Whether to write anything; None writes everything, finite or not."""
    measures_rms: bool = False
    extra_args: Mapping[str, Any] = field(default_factory=dict)
    """The arguments of ``tx.update`` by name."""
    of_tensors: tuple[Sharding, ...] = ()
    """The sharding of one tensor of each leaf."""
    of_own: Mapping[Group, list[Sharding]] = field(default_factory=dict)
    """The shardings of the state for one tensor of each leaf of a group."""

    def __call__(
        self, group: Group, layer: jax.Array | None, weights: Sequence[Any], gradients: Sequence[Any], own: list[Any]
    ) -> tuple[list[Any], list[Any], Statistics]:
        """The weights and own state after the step."""
        gradients = [_times(g, self.unscale) for g in self._spread(group, gradients)]
        owners = self.optimizer.owners(group)
        # If a gradient's squares overflow float32, so would what a rule keeps of it: only keeping nothing is right.
        keeps_none = [i not in owners and None not in owners for i in group.leaves]
        squares = [_squares(g, beyond=beyond) for g, beyond in zip(gradients, keeps_none)]
        statistics = _statistics(squares)
        gradients = [_times(g, self.clip) for g in gradients]
        floats = list(map(as_floats, weights))
        updates, new_own = self._ask(group, gradients, own, floats)
        # State that tx returns unchanged stays the same value and is not written: AdaLomo's state has such parts.
        new_own = [
            new if new is old else constrain(new.astype(old.dtype), sharding)
            for new, old, sharding in zip(new_own, own, self.of_own[group], strict=True)
        ]
        written = self._spread(group, self._write(group, layer, weights, updates))
        if self.measures_rms:
            statistics = statistics._replace(update_rms=list(map(_rms, updates)), param_rms=list(map(_rms, floats)))
        if self.proceed is None:
            return written, new_own, statistics
        # Each tensor by itself: otherwise all gradients of a layer would have to wait for the last one.
        scaled = [beyond and self.clip is None for beyond in keeps_none]
        known = [x.scaled if beyond else x.plain for x, beyond in zip(squares, scaled)]
        proceed = self.proceed
        if self.clip is None:
            flags = [proceed & jnp.isfinite(x) for x in known]
        else:  # The norm of the whole gradient is finite, or nothing is written; squares may overflow.
            flags = each_known(lambda x: proceed & (x >= 0), known)
        ok = dict(zip(group.leaves, flags))
        all_ok = jnp.all(jnp.stack([*ok.values()]))
        own_ok = [all_ok if owner is None else ok[owner] for owner in owners]
        keep_unless = lambda ok, new, old: jax.tree.map(partial(jnp.where, ok), new, old)
        written = list(map(keep_unless, ok.values(), written, weights))
        return (
            written,
            [old if new is old else jnp.where(ok, new, old) for ok, new, old in zip(own_ok, new_own, own)],
            statistics._replace(written=jnp.stack([*ok.values()])),
        )

    def parts(self, group: Group, sets: Sequence[Sequence[int]]) -> list[Part]:
        """The group's stacks in parts, given sets of their positions; the sets are updated one after another.

        All stacks are one part if ``tx`` keeps something for several of them.
        """
        owners = self.optimizer.owners(group)
        if len(sets) == 1 or None in owners:
            return [Part(tuple(range(len(group.leaves))), tuple(range(len(owners))), partial(self, group))]
        parts = []
        for positions in sets:
            of_set = Group(tuple(group.leaves[k] for k in positions), group.layers)
            own = tuple(p for p, owner in enumerate(owners) if owner in of_set.leaves)
            updater = replace(self, of_own={of_set: [self.of_own[group][p] for p in own]})
            parts.append(Part(tuple(positions), own, partial(updater, of_set)))
        return parts

    def measure(self, group: Group | None, gradients: Sequence[Any]) -> Statistics:
        """The statistics of gradients that are not used."""
        spread = gradients if group is None else self._spread(group, gradients)
        return _statistics([_squares(_times(g, self.unscale), beyond=True) for g in spread])

    def update_all(
        self, inner: optax.OptState, leaves: Sequence[Any], gradients: Mapping[int, Any]
    ) -> tuple[list[Any], optax.OptState, dict[Group, Statistics]]:
        """All leaves after the step, and the new state, given all gradients at once."""
        written, owns, statistics = list(leaves), {}, {}
        for group in self.optimizer.groups:
            weights, of_group = [leaves[i] for i in group.leaves], [gradients[i] for i in group.leaves]
            own = self.optimizer.own(inner, group)
            if group.layers is None:
                weights, owns[group], statistics[group] = self(group, None, weights, of_group, own)
            else:
                axes = [self.axes[i] or 0 for i in group.leaves]
                update_layer = partial(self, group)
                weights, owns[group], statistics[group] = _update_stacks(update_layer, axes, weights, of_group, own)
            for i, leaf in zip(group.leaves, weights, strict=True):
                written[i] = leaf
        return written, self.next_state(inner, owns, statistics), statistics

    def next_state(
        self, inner: optax.OptState, owns: Mapping[Group, list[Any]], statistics: Mapping[Group, Statistics]
    ) -> optax.OptState:
        """The state after the step, given what is kept for each group. Counts stay if nothing was written."""
        shared = self.optimizer.next_shared(inner, **self.extra_args)
        if self.proceed is not None:
            wrote = any_written(statistics)
            shared = [jnp.where(wrote, new, old) for new, old in zip(shared, self.shared, strict=True)]
        spread = []
        for group in self.optimizer.groups:
            shardings = self.of_own[group] if group.layers is None else map(of_stack, self.of_own[group])
            spread.append(list(map(constrain, owns[group], shardings)))
        return self.optimizer.assemble(shared, spread)

    def _spread(self, group: Group, tensors: Sequence[Any]) -> list[Any]:
        """The tensors, one of each leaf, sharded as the leaf is."""
        return [constrain(x, self.of_tensors[i]) for i, x in zip(group.leaves, tensors, strict=True)]

    def _ask(
        self, group: Group, gradients: Sequence[Any], own: list[Any], weights: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """The updates and the new own state. Updates are float32 if weights are rounded stochastically.

        They are so because gradients are float32: a narrow dtype would lose small steps before they are rounded.
        """
        wide = [g if self.keys[i] is None else _wide(g) for i, g in zip(group.leaves, gradients)]
        ask = partial(self.optimizer.update, group, own=own, shared=self.shared, leaves=weights, **self.extra_args)
        with jax.numpy_dtype_promotion("standard"):  # gradients are wider than what tx may keep
            try:
                return ask(wide)[:2]
            except TypeError as error:
                # A branch within tx, such as optax.contrib.galore's, may ask for gradients as narrow as its state.
                updates, new_own, _ = ask(gradients)
                warnings.warn(
                    "tx does not take float32 gradients with its narrower state, so its updates are as narrow. Small "
                    f"steps are rounded before they are written ({str(error).splitlines()[0]}).",
                    stacklevel=2,
                )
                return updates, new_own

    def _write(
        self, group: Group, layer: jax.Array | None, weights: Sequence[Any], updates: Sequence[Any]
    ) -> list[Any]:
        keys = [self.keys[i] for i in group.leaves]
        if layer is not None:
            some = [key for key in keys if key is not None]
            folded = iter(jax.vmap(jax.random.fold_in, (0, None))(jnp.stack(some), layer) if some else ())
            keys = [None if key is None else next(folded) for key in keys]
        with jax.numpy_dtype_promotion("standard"):
            return list(map(_add, weights, updates, keys))


def any_written(statistics: Mapping[Group, Statistics]) -> jax.Array:
    """Whether a step has written anything."""
    return jnp.any(jnp.stack([jnp.any(s.written) for s in statistics.values()]))


def all_statistics(parts: Sequence[Statistics], positions: Sequence[int]) -> Statistics:
    """The statistics of all tensors, given those of some at a time, and the position of each tensor among all."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    squares = total([part.squares for part in parts])
    written = jnp.concatenate([part.written for part in parts], axis=-1)[..., jnp.array(order)]
    in_order = lambda flat: [flat[k] for k in order] if flat else []
    rms_of = lambda name: in_order([x for part in parts for x in getattr(part, name)])
    return Statistics(squares, written, rms_of("update_rms"), rms_of("param_rms"))


def total(squares: Sequence[Squares]) -> Squares:
    """The squares of all gradients, given those of some at a time."""
    zero = jnp.zeros([], jnp.float32)
    return Squares(sum((x.plain for x in squares), start=zero), sum((x.scaled for x in squares), start=zero))


def _statistics(squares: Sequence[Squares]) -> Statistics:
    """The statistics of tensors that are all written, given the squares of their gradients."""
    return Statistics(total(squares), jnp.ones(len(squares), bool), [], [])


def _squares(gradient: Any, *, beyond: bool) -> Squares:
    """The squares of one tensor; with ``beyond``, also the scaled ones that do not overflow, in the same pass."""
    if not beyond:
        return Squares(_sum_of_squares(gradient), jnp.array(jnp.inf, jnp.float32))
    gradient, zero = gradient.astype(jnp.float32), jnp.zeros([], jnp.float32)
    add = lambda old, new: (old[0] + new[0], old[1] + new[1])
    # One reduction of pairs: with two reductions, XLA's CPU compiler would write out the terms of the second.
    terms = jnp.square(gradient), jnp.square(gradient * _BEYOND)
    return Squares(*lax.reduce(terms, (zero, zero), add, tuple(range(gradient.ndim))))


def _sum_of_squares(gradient: Any) -> jax.Array:
    """The sum of squares over all entries, in float32."""
    squares = jnp.square(gradient.astype(jnp.float32))
    if gradient.ndim < 2:
        return jnp.sum(squares)
    # AdaLomo sums rows, too. XLA shares these sums if the barrier keeps it from merging the two sums here into one.
    return jnp.sum(lax.optimization_barrier(jnp.sum(squares, axis=-1)))


def _update_stacks(
    update_layer: UpdateLayer, axes: Sequence[int], weights: list[Any], gradients: list[Any], own: list[Any]
) -> tuple[list[Any], list[Any], Statistics]:
    """Stacks and their state after the step, in place, layer by layer: the random bits for rounding are per layer."""

    def iteration(carry, i):
        layers, of_layers = ([layer_at(x, i, axis) for x, axis in zip(xs, axes)] for xs in (carry.weights, gradients))
        return update(carry, axes, i, i + 1, layers, of_layers, update_layer)

    stacks, statistics = lax.scan(iteration, start(weights, own, 0), jnp.arange(weights[0].shape[axes[0]]))
    return stacks.weights, stacks.own, statistics


def _add(weight: Any, update: Any, key: jax.Array | None) -> Any:
    """The weight after an update, in the form in which it is kept."""
    return weight.add(update, key) if is_kept(weight) else apply_update(weight, update, key)


def _times(gradient: Any, factor: jax.Array | None) -> Any:
    """The gradient times the factor, in float32; unchanged if there is no factor."""
    return gradient if factor is None else _wide(gradient) * factor


def _wide(gradient: Any) -> Any:
    """The gradient in float32, if its dtype is narrower."""
    return gradient.astype(promoted(gradient.dtype, jnp.float32))


def _rms(x: jax.Array) -> jax.Array:
    return rms(x) if x.size else jnp.zeros([], jnp.float32)
