"""What a state was made for: the shapes of a call, and how its arrays are spread."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding

from adalomo_jax.fused.plan.paths import leaves_with_paths, path_name
from adalomo_jax.fused.sharding import Sharding, sharding_of


@jax.tree_util.register_static
@dataclass(frozen=True)
class Signature:
    """What a state was made for. It is part of the state's structure, not of its arrays."""

    params: tuple[tuple[str, tuple[int, ...], str], ...]
    """The path, shape and dtype of each parameter."""
    args: tuple[str, ...]
    """The path of each leaf of the loss's other arguments."""
    shardings: tuple[Sharding, ...] = ()
    """How each parameter was spread."""
    args_shardings: tuple[Sharding, ...] = ()
    """How each leaf of the other arguments was spread."""


def signature_of(params: Any, args: Sequence[Any]) -> Signature:
    """The signature of a call."""
    leaves = [(path_name(path), tuple(x.shape), str(x.dtype)) for path, x in leaves_with_paths(params)]
    return Signature(
        params=tuple(leaves),
        args=tuple(f"args{jax.tree_util.keystr(path)}" for path, _ in leaves_with_paths(args)),
        shardings=tuple(sharding_of(x) for _, x in leaves_with_paths(params)),
        args_shardings=tuple(sharding_of(x) for x in jax.tree.leaves(args)),
    )


def is_for(state: Signature, called: Signature) -> bool:
    """Whether a state is for a call with these parameters and arguments."""
    return (state.params, state.args) == (called.params, called.args)


def check_signature(state: Signature, called: Signature) -> None:
    """Refuses a call with parameters or arguments unlike those of `init`."""
    way_out = "Make a state for them with step.init(params, *args)."
    if state.params != called.params:
        _check_placed_alike(state, called)
        was, now = (dict((path, rest) for path, *rest in s.params) for s in (state, called))
        path = next(path for path in {**was, **now} if was.get(path) != now.get(path))
        say = lambda found: f"{found[1]}{list(found[0])}" if found else "absent"
        raise ValueError(
            f"The state was made for other parameters: {path!r} was {say(was.get(path))} in init, "
            f"and is {say(now.get(path))} now. {way_out}"
        )
    if state.args != called.args:
        path = next(iter(set(state.args).symmetric_difference(called.args)))
        when = (
            "was present in init, and is absent now" if path in state.args else "is present now, and was absent in init"
        )
        raise ValueError(f"The arguments of the loss have another structure than in init: {path} {when}. {way_out}")


def _check_placed_alike(state: Signature, called: Signature) -> None:
    """Refuses placed parameters with a state for parameters that are not placed, and the other way round."""
    if stack := _stack_in(state, called):
        raise ValueError(
            f"The state is for parameters of step.place, in which {stack}; these are not placed. Give the step "
            "placed = step.place(params, *args), or the state step.unplace_state(state, placed, *args)."
        )
    if stack := _stack_in(called, state):
        raise ValueError(
            f"The parameters are of step.place, in which {stack}; the state is for parameters that are not placed. "
            "Give the step step.place_state(state, params, *args), or step.unplace(params)."
        )


def _stack_in(placed: Signature, unplaced: Signature) -> str | None:
    """Says which stack is in `placed` while its layers are apart in `unplaced`, if the two are otherwise alike."""
    ours, theirs = ({path: rest for path, *rest in s.params} for s in (placed, unplaced))
    stacks = [path for path in ours if path in theirs and ours[path] != theirs[path]]
    are_layers = all([ours[path][0][1:], ours[path][1]] == theirs[path] for path in stacks)
    if not (stacks and are_layers and ours.keys() < theirs.keys()):
        return None
    return f"{stacks[0]!r} is a stack of {ours[stacks[0]][0][0]} layers"


def check_spread(state: Signature, params: Any, args: Sequence[Any]) -> None:
    """Refuses parameters, and a batch to slice, that are spread differently than in `init`; traced ones do not show it.

    The step spreads its values as `init` saw them, so it would gather these arrays on each device, or cut them again.
    """
    for name, tree, shardings in (("params", params, state.shardings), ("args", args, state.args_shardings)):
        paths_and_leaves = leaves_with_paths(tree)
        if not any(shardings) or len(paths_and_leaves) != len(shardings):
            continue
        for (path, x), was in zip(paths_and_leaves, shardings):
            parts = jax.tree.leaves(x)
            if was is None or any(isinstance(part, Tracer) or not isinstance(part, jax.Array) for part in parts):
                continue
            now = sharding_of(x)
            if now is None or not was.is_equivalent_to(now, x.ndim):
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} is sharded differently than when the state was made: "
                    f"{_spread(was)} then, {_spread(now or x.sharding)} now. Make the state for arrays as they are now "
                    "with step.init(params, *args), or spread them as they were with jax.device_put."
                )


def _spread(sharding: Any) -> str:
    """Describes a sharding in one line."""
    if not isinstance(sharding, NamedSharding):
        return " ".join(str(sharding).split())
    return f"{sharding.spec} over {dict(sharding.mesh.shape)}"
