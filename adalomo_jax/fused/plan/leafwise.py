"""Whether a transformation treats leaves separately, decided by comparing what it does with some leaves and with all.

The fused step never holds two layers' gradients: it asks `tx` about a group of leaves at a time, and about one layer of
a stack. So the check traces `tx` as the step asks it, and on the whole tree. Each update, and each leaf of the state,
must be the same function of the same inputs in both, and depend on one leaf; state of no leaf must depend on none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax

from adalomo_jax.fused.plan.contents import primitives_of
from adalomo_jax.fused.plan.jaxpr import trace
from adalomo_jax.fused.plan.terms import Terms
from adalomo_jax.optimizers.layer_axes import LayerKey
from adalomo_jax.optimizers.per_layer import Group, PerLayer, asking_for

_WAY_OUT = (
    "fuse needs a tx that treats leaves separately, because it never holds all gradients. Leave out the part that "
    "mixes them. Instead of optax.clip_by_global_norm, use fuse(..., max_grad_norm=...); instead of optax.MultiSteps, "
    "fuse(..., microbatches=...). skip_nonfinite already does the work of optax.apply_if_finite."
)
_OF_SOME = (
    "is computed differently among all leaves than among the leaves updated together. It depends on the number of "
    "leaves, or on the shapes or dtypes of others (then fix the dtype, as with "
    "optax.inject_hyperparams(..., hyperparam_dtype=...))."
)
_RANDOM = {"random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform", "random_gamma"}


def check_leafwise(
    optimizer: PerLayer,
    paths: Sequence[str],
    extra_args: Mapping[str, Any],
    *,
    one_by_one: bool = False,
) -> None:
    """Raises ValueError if the update of one leaf, or state that is kept for no leaf, depends on another leaf.

    It also raises if ``tx`` draws random numbers: keys are kept for no leaf, so each layer would get the same numbers.
    And it raises if an update changes the state's structure. Nothing is computed.

    Args:
      optimizer: ``tx`` and the groups in which it is asked.
      paths: the parameters' paths.
      extra_args: the extra arguments of ``tx.update``, or their shapes.
      one_by_one: whether the step asks about the stacks of one group one after the other.

    Raises:
      ExtraArgumentMissing: if ``tx.update`` needs more arguments.
    """
    if not optimizer.groups:
        return
    groups = [Group((i,), g.layers) for g in optimizer.groups if one_by_one and g.layers is not None for i in g.leaves]
    _check(optimizer, [*optimizer.groups, *groups], [repr(path) for path in paths], extra_args)
    if any(group.layers is not None for group in optimizer.groups):
        twin, names = _with_two_layers(optimizer, paths)
        _check(twin, [group for group in twin.groups if group.layers is not None], names, extra_args, is_twin=True)


def rules_of_leaves(optimizer: PerLayer, extra_args: Mapping[str, Any]) -> dict[int, Any]:
    """What ``tx`` does with each trained leaf among all; equal for leaves that it treats alike.

    Raises:
      ExtraArgumentMissing: if ``tx.update`` needs more arguments.
    """
    terms, trained = Terms(), Group(tuple(sorted(i for group in optimizer.groups for i in group.leaves)), None)
    if not trained.leaves:
        return {}
    asked, _ = _ask(terms, optimizer, trained, extra_args)
    own: dict[int, list[Any]] = {i: [] for i in trained.leaves}
    for path, owner in zip(asked.state, optimizer.owners_of(list(asked.state))):
        if owner is not None and path not in optimizer.shared_paths:
            own[owner].append(path)
    rules = {}
    for i, paths in own.items():
        names = {("gradient", i): "gradient", ("parameter", i): "parameter"}
        names |= {("state", path): k for k, path in enumerate(paths)}
        of_leaf = [asked.updates[i], *(x for path in paths for x in (asked.init[path], asked.state[path]))]
        rules[i] = tuple(terms.renamed(term, names) for term in of_leaf)
    return rules


class _Asked(NamedTuple):
    """What ``tx`` does with some leaves, in terms of their gradients, their tensors and the state before."""

    init: dict[Any, int]
    """By the path in the state."""
    updates: dict[int, int]
    """By the leaf's position."""
    state: dict[Any, int]


def _check(
    optimizer: PerLayer,
    groups: Sequence[Group],
    names: Sequence[str],
    extra_args: Mapping[str, Any],
    is_twin: bool = False,
) -> None:
    terms = Terms()
    trained = Group(tuple(sorted(i for group in optimizer.groups for i in group.leaves)), None)
    try:
        whole, types = _ask(terms, optimizer, trained, extra_args)
    except Exception:
        if is_twin:  # tx knows the parameters' structure, so it cannot be given layers apart
            return
        raise
    _check_dependence(terms, whole, set(optimizer.shared_paths), names)
    first, covered = min(groups, key=lambda group: min(group.leaves)), set(optimizer.shared_paths)
    for group in groups:
        some, _ = _ask(terms, optimizer, group, extra_args, types)
        for i in group.leaves:
            if some.updates[i] != whole.updates[i]:
                raise ValueError(f"tx mixes leaves: the update of {names[i]} {_OF_SOME} {_WAY_OUT}")
        for path, new in some.state.items():
            is_own = path not in optimizer.shared_paths
            as_in_whole = whole.state.get(path) == new and (not is_own or whole.init.get(path) == some.init[path])
            if not as_in_whole and (is_own or group == first):
                raise ValueError(f"tx mixes leaves: its {_name(path)} {_OF_SOME} {_WAY_OUT}")
        covered.update(some.state)
    for path in whole.state.keys() ^ covered:
        if not is_twin:
            raise ValueError(f"tx mixes leaves: its {_name(path)} exists only for some leaves together. {_WAY_OUT}")


def _check_dependence(terms: Terms, whole: _Asked, shared: set[Any], names: Sequence[str]) -> None:
    """Refuses updates that depend on another leaf, state that depends on two, or shared state that depends on any."""
    of_state = _behind_state(terms, whole)
    for i, update in whole.updates.items():
        others = sorted((kind, leaf) for kind, leaf in _behind(terms, update, of_state) if leaf != i)
        if others:
            on = _name_all(others[:1], names)
            raise ValueError(f"tx mixes leaves: the update of {names[i]} depends on {on}. {_WAY_OUT}")
    for path, behind in of_state.items():
        if len({leaf for _, leaf in behind}) > 1 or (behind and path in shared):
            on = _name_all(sorted(behind)[:2], names)
            raise ValueError(f"tx mixes leaves: its {_name(path)} depends on {on}. {_WAY_OUT}")
        read = {p for kind, p in terms.inputs_of(whole.state[path]) if kind == "state"}
        if path in shared and read - shared:
            raise ValueError(f"tx mixes leaves: its {_name(path)} depends on state that is kept for leaves. {_WAY_OUT}")


_Behind = set[tuple[str, int]]
"""The gradients and parameters that something depends on, by the leaf's position."""


def _behind(terms: Terms, term: int, of_state: Mapping[Any, _Behind]) -> _Behind:
    """What a term depends on, given what is behind each leaf of the state."""
    inputs = terms.inputs_of(term)
    direct = {(kind, name) for kind, name in inputs if kind in ("gradient", "parameter")}
    return direct.union(*(of_state[name] for kind, name in inputs if kind == "state"))


def _behind_state(terms: Terms, whole: _Asked) -> dict[Any, _Behind]:
    """What is behind each leaf of the state, after any step."""
    none: dict[Any, _Behind] = {path: set() for path in whole.state}
    read = {path: [p for kind, p in terms.inputs_of(term) if kind == "state"] for path, term in whole.state.items()}
    behind = {p: _behind(terms, whole.init[p], none) | _behind(terms, whole.state[p], none) for p in whole.state}
    while True:
        found = {path: behind[path].union(*(behind[p] for p in read[path])) for path in behind}
        if found == behind:
            return found
        behind = found


def _name_all(behind: Sequence[tuple[str, int]], names: Sequence[str]) -> str:
    kind, several = behind[0][0], "s" if len(behind) > 1 else ""
    return f"the {kind}{several}{' of' if kind == 'gradient' else ''} {', '.join(names[leaf] for _, leaf in behind)}"


def _ask(
    terms: Terms,
    optimizer: PerLayer,
    group: Group,
    extra_args: Mapping[str, Any],
    types: Mapping[Any, Any] | None = None,
) -> tuple[_Asked, dict[Any, Any]]:
    """What ``tx`` does with the leaves of a group, and the types of the state's leaves, if they are not given."""
    tensors = [optimizer.tensors[i] for i in group.leaves]
    tree_of = partial(optimizer.tree_of, group.leaves)
    inputs = lambda kind, names: [terms.input((kind, name)) for name in names]
    extra, extra_treedef = jax.tree.flatten(dict(extra_args))

    def update(grads: list[Any], params: list[Any], state: list[Any], extra: list[Any]) -> tuple[list[Any], Any]:
        keywords = extra_treedef.unflatten(extra)
        updates, after = optimizer.tx.update(tree_of(grads), treedef.unflatten(state), tree_of(params), **keywords)
        return jax.tree.leaves(updates), after

    with asking_for(None if types is None else group):
        program, treedef = trace(lambda tensors: optimizer.tx.init(tree_of(tensors)), tensors)
        _check_not_random(primitives_of(program.equations))
        paths = _paths(treedef)
        types = {p: _type(program.avals[v]) for p, v in zip(paths, program.outputs)} | dict(types or {})
        init = dict(zip(paths, terms.outputs(program, inputs("parameter", group.leaves)), strict=True))
        program, result = trace(update, tensors, list(tensors), [types[path] for path in paths], extra)
        _check_not_random(primitives_of(program.equations))
    _check_state_stays(paths, _paths(result.children()[1]), types, program.avals, program.outputs[len(tensors) :])
    names = (("gradient", group.leaves), ("parameter", group.leaves), ("state", paths), ("extra", range(len(extra))))
    found = terms.outputs(program, [term for kind, of_kind in names for term in inputs(kind, of_kind)])
    updates = dict(zip(group.leaves, found[: len(tensors)], strict=True))
    return _Asked(init, updates, dict(zip(paths, found[len(tensors) :], strict=True))), types


def _check_not_random(primitives: set[str]) -> None:
    if primitives & _RANDOM:
        raise ValueError(
            "tx draws random numbers. Asked layer by layer, it would draw the same ones for each layer. "
            "Leave out the part that draws them, such as optax.add_noise."
        )


def _check_state_stays(before: list[Any], after: list[Any], types: Any, avals: Any, outputs: Sequence[int]) -> None:
    """Refuses an update that changes the state's structure or the shape of a leaf in it."""
    changed = [path for path in after if path not in before] + [path for path in before if path not in after]
    if not changed:
        changed = [path for path, v in zip(after, outputs, strict=True) if types[path].shape != avals[v].shape]
    if changed:
        raise ValueError(
            f"tx.update changes the state's structure or shapes: {_name(changed[0])} is not what tx.init made. A step "
            "must keep both. If it is a measurement, as in optax.monitor, leave it out of tx: "
            'result.metrics has "grad_norm", and with fuse(..., rms_metrics=True) the updates\' norms.'
        )


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class _Layers:
    """Two layers of a stack, in place of the stack."""

    layers: tuple[Any, Any]
    key: Any
    """The last entry of the stack's path. To functions of a path, those of its layers look the same."""

    def tree_flatten_with_keys(self):
        return tuple((LayerKey(self.key, i), layer) for i, layer in enumerate(self.layers)), self.key

    @classmethod
    def tree_unflatten(cls, key, layers):
        return cls(tuple(layers), key)


def _with_two_layers(optimizer: PerLayer, paths: Sequence[str]) -> tuple[PerLayer, list[str]]:
    """The transformation on a tree in which two layers of each stack are separate leaves; and the leaves' names."""
    treedef, n = optimizer.treedef, optimizer.treedef.num_leaves
    stacked = {i for group in optimizer.groups if group.layers is not None for i in group.leaves}
    keys = [path[-1] if path else None for path in _paths(treedef)]
    leaves, twin = jax.tree.flatten(
        treedef.unflatten([_Layers(((i, 0), (i, 1)), keys[i]) if i in stacked else (i, 0) for i in range(n)]),
        is_leaf=lambda x: type(x) is tuple and len(x) == 2 and all(type(k) is int for k in x),
    )
    position = {leaf: k for k, leaf in enumerate(leaves)}
    groups = []
    for group in optimizer.groups:
        for layer in (0,) if group.layers is None else (0, 1):
            groups.append(Group(tuple(position[i, layer] for i in group.leaves), group.layers))
    names = [
        f"{('one layer', 'another layer')[k]} of {paths[i]!r}" if i in stacked else repr(paths[i]) for i, k in leaves
    ]
    tensors = tuple(optimizer.tensors[i] for i, _ in leaves)
    return PerLayer(optimizer.tx, twin, tensors, tuple(groups)), names


def _paths(treedef: Any) -> list[Any]:
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(treedef.unflatten(range(treedef.num_leaves)))]


def _type(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _name(path: Any) -> str:
    return f"state{jax.tree_util.keystr(path)}"
