"""Cuts a traced loss into the stages of its backward pass, and says where each parameter is updated."""

from collections.abc import Callable, Collection, Sequence

from adalomo_jax.fused.plan.chain import Chain
from adalomo_jax.fused.plan.dependence import active_in_scan, active_values, batched_in_scan, batched_values
from adalomo_jax.fused.plan.homes import Home, find_homes
from adalomo_jax.fused.plan.jaxpr import Equation, Program, Scan, is_checkpoint, scan_of
from adalomo_jax.fused.plan.lists import Lists, nth, period_of
from adalomo_jax.fused.plan.plan import LayerScan, LeafPlan, Plan, Segment, Stack, Stage
from adalomo_jax.fused.sharding import Sharding, of_layer


def make_plan(
    program: Program,
    paths: Sequence[str],
    trained: Sequence[bool],
    batched_inputs: Collection[int] = (),
    shardings: Sequence[Sharding] = (),
    layer_paths: Sequence[tuple[str, ...]] = (),
    forms: Sequence[str] = (),
    find_lists: Callable[[], Lists] = Lists,
) -> Plan:
    """Plans the updates of the program's first ``len(paths)`` inputs, which are the parameters.

    Args:
      program: the traced loss; with microbatches, that of one microbatch.
      paths: the path of each parameter.
      trained: whether each parameter is trained.
      batched_inputs: the inputs that differ between microbatches; none if there are no microbatches.
      shardings: the sharding of each parameter, if they are known.
      layer_paths: the paths of each parameter's layers, if layers of a list were stacked.
      forms: the name of the form in which each parameter is kept; empty for an array.
      find_lists: searches the lists of layers for parameters that are not stacked.
    """
    shardings, layer_paths = shardings or [None] * len(paths), layer_paths or [()] * len(paths)
    forms = forms or [""] * len(paths)
    values = program.inputs[: len(paths)]
    active = frozenset(active_values(program, [v for v, is_trained in zip(values, trained) if is_trained]))
    homes, chains = find_homes(program, values)
    is_stage = [bool(active.intersection(scan.inputs) or active.intersection(chain.axes)) for scan, chain in chains]
    stack = lambda i, v, axis: Stack(i, v, axis, trained[i], of_layer(shardings[i], axis, keepdims=True))
    layer_scans = [
        (scan, chain, [stack(i, v, chain.axes[v]) for i, v in enumerate(values) if v in chain.axes])
        for (scan, chain), counts in zip(chains, is_stage)
        if counts
    ]
    # Any other equation has only batched results, or none: a segment runs for each microbatch, or once.
    batched = None
    if batched_inputs:
        batched = frozenset(batched_values(program, batched_inputs, [scan for scan, _, _ in layer_scans]))
    trained_values = {v for v, is_trained in zip(values, trained) if is_trained}
    stages = _stages(program, layer_scans, trained_values, active, batched)
    leaves = []
    for i, (path, value, home) in enumerate(zip(paths, values, homes)):
        aval = program.avals[value]
        read_by = tuple(s for s, stage in enumerate(stages) if value in stage.inputs)
        in_scan = trained[i] and home.axis is not None
        leaves.append(
            LeafPlan(
                path=path,
                shape=aval.shape,
                dtype=str(aval.dtype),
                trained=trained[i],
                layers=aval.shape[home.axis] if in_scan else None,
                axis=home.axis if in_scan else None,
                stage=min(read_by, default=0),
                read_by=read_by,
                reason=_reason(home, trained[i], layer_paths[i]),
                misplaced=trained[i] and (home.misplaced or bool(layer_paths[i] and home.axis is None)),
                sharding=shardings[i],
                form=forms[i],
                layer_paths=layer_paths[i],
            )
        )
    return Plan(tuple(leaves), program, stages, active, batched or frozenset(), find_lists)


def _reason(home: Home, is_trained: bool, of_list: Sequence[str]) -> str:
    if not is_trained:
        return "it is not trained"
    if not of_list:
        return home.reason
    if home.axis is None:
        return "layers of a list do not repeat in this loss"
    period = period_of(of_list)
    return f"{home.reason}, {f'every {nth(period)} of a list' if period and period > 1 else 'stacked from a list'}"


def _stages(
    program: Program,
    layer_scans: Sequence[tuple[Equation, Chain, list[Stack]]],
    trained: set[int],
    active: Collection[int],
    batched: Collection[int] | None,
) -> tuple[Stage, ...]:
    """Cuts the program before and after each layer scan, and each checkpoint that reads a trained parameter."""
    of_scan = {id(scan): (chain, stacks) for scan, chain, stacks in layer_scans}
    in_chain = {id(equation) for _, chain, _ in layer_scans for equation in chain.equations}
    others = [equation for equation in program.equations if id(equation) not in in_chain]
    by_itself = lambda e: id(e) in of_scan or (is_checkpoint(e) and bool(trained.intersection(e.inputs)))
    stages: list[Stage] = []
    read_later = set(program.outputs)
    for part in reversed(_cut(others, by_itself)):
        if part and id(part[0]) in of_scan:
            stages.append(_layer_scan(part[0], *of_scan[id(part[0])], active, batched, read_later))
            read_later.update(stages[-1].inputs)
        else:
            stages += reversed(_segments(part, batched, read_later))
    return tuple(reversed(stages))


def _cut(equations: Sequence[Equation], by_itself: Callable[[Equation], bool]) -> list[list[Equation]]:
    """Cuts the equations before and after each one that stands by itself. No equations make one empty part."""
    parts: list[list[Equation]] = [[]]
    for equation in equations:
        if by_itself(equation):
            parts += [[equation], []]
        else:
            parts[-1].append(equation)
    return [part for part in parts if part] or [[]]


def _body(
    scan: Scan, equations: Sequence[Equation], layers: Collection[int], batched: Collection[int] | None
) -> list[Segment]:
    """If a body has several checkpoints that read a trained layer, each is pulled back by itself."""
    checkpoints = {id(e) for e in equations if is_checkpoint(e) and any(v in layers for v in e.inputs)}
    parts = _cut(equations, lambda e: id(e) in checkpoints) if len(checkpoints) > 1 else [list(equations)]
    segments: list[Segment] = []
    read_later = set(scan.body.outputs)
    for part in reversed(parts):
        segments += reversed(_segments(part, batched, read_later))
    return segments[::-1]


def _segments(equations: Sequence[Equation], batched: Collection[int] | None, read_later: set[int]) -> list[Segment]:
    """A segment of what is the same for each microbatch, then one of the rest. Adds their inputs to `read_later`."""
    differs = [batched is not None and (e.has_effects or any(v in batched for v in e.outputs)) for e in equations]
    same = [equation for equation, flag in zip(equations, differs) if not flag]
    mapped = [equation for equation, flag in zip(equations, differs) if flag]
    segments = []
    for part, flag in ((mapped, True), (same, False)):
        if part or (not equations and not flag):
            made = {v: None for equation in part for v in equation.outputs}
            read = {v: None for equation in part for v in equation.inputs}
            inputs, outputs = [v for v in read if v not in made], [v for v in made if v in read_later]
            segments.append(Segment(tuple(part), tuple(inputs), tuple(outputs), flag))
            read_later.update(inputs)
    return segments[::-1]


def _layer_scan(
    equation: Equation,
    chain: Chain,
    stacks: list[Stack],
    active: Collection[int],
    batched: Collection[int] | None,
    read_later: Collection[int],
) -> LayerScan:
    scan = scan_of(equation)
    from_stacks = {stack.value for stack in stacks} | {e.outputs[0] for e in chain.equations}
    inner_active = frozenset(active_in_scan(scan, [v in active for v in equation.inputs]))
    inner_batched = None
    if batched is not None:
        inner_batched = frozenset(batched_in_scan(scan, [v in batched for v in equation.inputs]))
    invariant, varying = _split_invariant(scan, inner_active | (inner_batched or frozenset()))
    pairs = list(zip(scan.body.inputs, equation.inputs))
    layers = tuple((v, outer) for v, outer in pairs[scan.first_xs :] if outer in from_stacks)
    trained = [v for v, outer in layers if outer in active]
    return LayerScan(
        scan=scan,
        operands=equation.inputs,
        outputs=equation.outputs,
        read_ys=tuple(p for p, v in enumerate(equation.outputs) if p >= scan.num_carry and v in read_later),
        stacks=tuple(stacks),
        chain=chain.of_one_layer,
        layers=layers,
        invariant=tuple(invariant),
        body=tuple(_body(scan, varying, trained, inner_batched)),
        active=inner_active,
        batched=inner_batched or frozenset(),
    )


def _split_invariant(scan: Scan, varies: Collection[int]) -> tuple[list[Equation], list[Equation]]:
    """Splits the body's equations: those without effects that read only values that never vary, and the others."""
    known = {*scan.body.constants, *scan.body.inputs[: scan.num_consts]}.difference(varies)
    invariant, varying = [], []
    for equation in scan.body.equations:
        if known.issuperset(equation.inputs) and not equation.has_effects:
            known.update(equation.outputs)
            invariant.append(equation)
        else:
            varying.append(equation)
    return invariant, varying
