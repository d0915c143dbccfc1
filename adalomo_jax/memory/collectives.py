"""What the devices of a compiled program send each other, read from the program's text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_BITS = {"pred": 8, "bf16": 16}


class Collectives(NamedTuple):
    """The operations of one kind in a program. One in a loop counts once, however often the loop runs."""

    count: int
    bytes: int
    """Bytes of their results on one device."""


def collectives_in(text: str) -> dict[str, Collectives]:
    """The collectives of a compiled program for one device, by kind, as ``compiled.as_text()`` prints it.

    Example:
        >>> collectives_in("  %g = bf16[8,4]{1,0} all-gather(%x), channel_id=1, dimensions={0}")
        {'all-gather': Collectives(count=1, bytes=64)}
    """
    found: dict[str, dict[str, int]] = {}
    pattern = re.compile(rf" = (\(.*?\)|\S+) ({'|'.join(_KINDS)})(-start)?\(")
    for number, line in enumerate(text.splitlines()):
        if (operation := pattern.search(line)) is not None:
            types, kind, is_start = operation.groups()
            sizes = [_bytes(*array) for array in re.findall(r"(\w+)\[([\d,]*)\]", types)]
            # A -start operation also returns its operand and flags. One that is cut into steps keeps its channel.
            size = max(sizes, default=0) if is_start else sum(sizes)
            channel = re.search(r"channel_id=\d+", line)
            found.setdefault(kind, {})[channel[0] if channel else str(number)] = size
    return {kind: Collectives(len(sizes), sum(sizes.values())) for kind, sizes in sorted(found.items())}


def _bytes(dtype: str, dims: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype) or (int(digits[0]) if digits else 0)
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8
