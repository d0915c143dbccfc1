"""Reads the kernels, their inputs and their results from a program that a compiler for CPUs, GPUs or TPUs wrote."""

import math
import re
from typing import NamedTuple

MOVES = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "copy-start",
    "copy-done",
    "slice-start",
    "slice-done",
    "fusion-done",
    "ConcatBitcast",
}
"""Opcodes that are not kernels. Copies and slices that start first and are done later bring an array into a TPU's
vector memory while kernels run. They bring it whole or in parts; ConcatBitcast then takes the parts as one array."""


class Array(NamedTuple):
    """One array that an instruction makes."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Instruction(NamedTuple):
    """An instruction of a compiled program, outside its fusions: a kernel or a move."""

    name: str
    opcode: str
    """For a call to code that is not XLA's own, the target of the call."""
    arrays: list[Array]
    operands: list[str]
    contains: frozenset[str]
    """Its opcode, or the opcodes of everything that it fuses."""
    index: int | None
    """The index of a get-tuple-element."""
    computation: str
    """The computation that contains it: the program, or a loop's body."""

    @property
    def is_kernel(self) -> bool:
        return self.opcode not in MOVES


def instructions_of(text: str) -> list[Instruction]:
    """The instructions of a compiled program's text outside its fusions, in order."""
    lines: dict[str, list[tuple[str, str, str, str]]] = {}
    computation = ""
    for line in text.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = opened[1]
            lines[computation] = []
        elif computation and (found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line)):
            lines[computation].append((found[1], found[2], found[3], found[4]))
    called = {name: _called(rest) for of_one in lines.values() for name, _, _, rest in of_one}
    fused = {name for name in called.values() if name is not None}

    def opcodes(opcode: str, rest: str) -> frozenset[str]:
        if opcode not in ("fusion", "fusion-start"):
            return frozenset({_target(rest) or opcode})
        return frozenset(o for _, _, op, r in lines[_called(rest) or ""] for o in opcodes(op, r))

    return [
        _instruction(name, shape, opcode, rest, opcodes(opcode, rest), computation)
        for computation, of_one in lines.items()
        if computation not in fused
        for name, shape, opcode, rest in of_one
    ]


def _called(rest: str) -> str | None:
    found = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", rest)
    return found and found[1]


def _target(rest: str) -> str | None:
    found = re.search(r'custom_call_target="([^"]*)"', rest)
    return found and found[1]


def _instruction(
    name: str, shape: str, opcode: str, rest: str, contains: frozenset[str], computation: str
) -> Instruction:
    index = re.search(r"\bindex=(\d+)", rest)
    arrays = [
        Array(dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    ]
    return Instruction(
        name=name,
        opcode=_target(rest) or opcode,
        arrays=arrays,
        operands=re.findall(r"%([\w.\-]+)", rest.split("), ")[0]),
        contains=contains,
        index=int(index[1]) if opcode == "get-tuple-element" and index else None,
        computation=computation,
    )
