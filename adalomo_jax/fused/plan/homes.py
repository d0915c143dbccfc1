"""The home of a parameter: the scan that can update it layer by layer, or the reason why none can."""

from collections.abc import Sequence
from typing import NamedTuple

from adalomo_jax.fused.plan.chain import Chain, arrays_in, chain_to
from adalomo_jax.fused.plan.jaxpr import Equation, Program, scan_of

NO_SCAN = "no scan reads it"
"""The reason for a leaf that is not a stack."""


class Home(NamedTuple):
    """Where a parameter can be updated."""

    scan: Equation | None
    """None if it can be updated only as a whole."""
    axis: int | None
    """The axis of its layers."""
    reason: str
    misplaced: bool
    """Whether a scan runs over its layers, and yet it has to be updated whole."""


def find_homes(program: Program, leaves: Sequence[int]) -> tuple[list[Home], list[tuple[Equation, Chain]]]:
    """The home of each leaf, and the scans that are home to any, with the chains that lead to them."""
    chains = []
    for equation in program.equations:
        if equation.name == "scan" and scan_of(equation).length > 0:
            chain = chain_to(program, equation, len(equation.inputs) - scan_of(equation).first_xs, leaves)
            if chain.axes:
                chains.append((equation, chain))
    return [_home(program, leaf, chains) for leaf in leaves], chains


def _home(program: Program, leaf: int, chains: Sequence[tuple[Equation, Chain]]) -> Home:
    for scan, chain in chains:
        if leaf in chain.axes:
            axis = chain.axes[leaf]
            reason = f"a scan runs over its {program.avals[leaf].shape[axis]} layers"
            done = _names_after(leaf, chain.equations) - {"transpose"}
            reason += f" on axis {axis}" if axis else ""
            reason += f", after {', '.join(sorted(done))}" if done else ""
            return Home(scan, axis, reason, False)
    return Home(None, None, *_why_whole(program, leaf))


def _names_after(leaf: int, equations: Sequence[Equation]) -> set[str]:
    """The names of the operations on a leaf and on the values that they make of it."""
    made, names = {leaf}, set()
    for equation in equations:
        if made.intersection(equation.inputs):
            made.update(equation.outputs)
            names.add(equation.name)
    return names


def _why_whole(program: Program, leaf: int) -> tuple[str, bool]:
    """Why a leaf is updated whole, and whether a scan runs over its layers."""
    readers = [equation for equation in program.equations if leaf in equation.inputs]
    scans = [equation for equation in readers if equation.name == "scan"]
    runs_over = [scan for scan in scans if leaf in scan.inputs[scan_of(scan).first_xs :]]
    if leaf in program.outputs:
        return "the loss returns it", bool(runs_over)
    if not readers:
        return "the loss does not read it", False
    if not scans:
        return _reason_without_scan(program, leaf)
    if len(readers) > len(scans):
        others = sorted({equation.name for equation in readers} - {"scan"})
        return f"a scan reads it, but so does {', '.join(others)}", bool(runs_over)
    if len(scans) > 1:
        return f"{len(scans)} scans read it", bool(runs_over)
    scan = scan_of(scans[0])
    if leaf in scans[0].inputs[: scan.first_xs]:
        return "each iteration of a scan reads all of it", bool(runs_over)
    return "its scan has no iterations", False


def _reason_without_scan(program: Program, leaf: int) -> tuple[str, bool]:
    """Follows the leaf through operations on it alone that keep its size, to a scan over their results."""
    size = program.avals[leaf].size
    made, names, alone = {leaf}, set(), {leaf, *program.constants}
    for equation in program.equations:
        if equation.name == "scan":
            if made.intersection(equation.inputs[scan_of(equation).first_xs :]):
                return f"a scan runs over it only after {', '.join(sorted(names))}", True
        elif made.intersection(equation.inputs) and alone.issuperset(arrays_in(program, equation)):
            made.update(v for v in equation.outputs if program.avals[v].size == size)
            alone.update(equation.outputs)
            names.add(equation.name)
    return NO_SCAN, False
