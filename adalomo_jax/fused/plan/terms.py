"""Terms: what programs compute, written so that two programs can be compared.

A term is an operation, its parameters and the terms that it is applied to, down to named inputs. Equal terms are kept
once and have one number: if two values have the same number, they are the same function of the same inputs. A value's
term has nothing that the value does not depend on, not even within branches and loops.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from adalomo_jax.fused.plan.jaxpr import (
    Equation,
    Program,
    Scan,
    While,
    branches_of,
    called_as_it_is,
    live_program,
    program_of,
    scan_of,
    while_of,
)
from adalomo_jax.jax_versions import is_jaxpr


class Terms:
    """Terms, by their numbers."""

    def __init__(self):
        self._numbers: dict[Hashable, int] = {}
        self._terms: list[tuple[Hashable, tuple[int, ...]]] = []
        self._by_identity: list[Any] = []
        """Kept alive, because an id may be reused."""

    def input(self, name: Hashable) -> int:
        """The term of an input."""
        return self._number(("input", name), ())

    def inputs_of(self, term: int) -> set[Any]:
        """The names of the inputs that a term depends on."""
        return {name for kind, name in self._leaves_of(term) if kind == "input"}

    def renamed(self, term: int, names: Mapping[Any, Hashable]) -> int:
        """The term with its inputs renamed; ``names`` maps each old name to the new one."""
        done = {self.input(old): self.input(("renamed", new)) for old, new in names.items()}
        left = [term]
        while left:
            operation, parts = self._terms[left[-1]]
            missing = [part for part in parts if part not in done]
            if left[-1] not in done and not missing:
                done[left[-1]] = self._number(operation, [done[part] for part in parts])
            left += missing or ()
            if not missing:
                left.pop()
        return done[term]

    def outputs(self, program: Program, inputs: Sequence[int], depth: int = 0) -> list[int]:
        """The terms of a program's outputs, given those of its inputs; ``depth`` counts the loops around it."""
        terms = {v: self._constant(x, program.avals[v].dtype) for v, x in program.constants.items()}
        terms |= zip(program.inputs, inputs, strict=True)
        for equation in program.equations:
            results = self._results(equation, [terms[v] for v in equation.inputs], depth)
            terms |= zip(equation.outputs, results, strict=True)
        return [terms[v] for v in program.outputs]

    def _results(self, equation: Equation, operands: list[int], depth: int) -> list[int]:
        if equation.name == "cond":
            return self._cond(equation, operands, depth)
        if equation.name == "scan":
            return self._scan(scan_of(equation), operands, depth)
        if equation.name == "while":
            return self._while(while_of(equation), operands, depth)
        called = called_as_it_is(equation)
        if called is not None:
            return self.outputs(program_of(called), operands, depth)
        operation = (equation.source.primitive, self._hashable(equation.params, depth))
        return [self._number((*operation, i), operands) for i in range(len(equation.outputs))]

    def _cond(self, equation: Equation, operands: list[int], depth: int) -> list[int]:
        of_branches = [self.outputs(program_of(b), operands[1:], depth) for b in branches_of(equation)]
        choose = lambda of_each: self._number("cond", (operands[0], *of_each))
        return [of_each[0] if len({*of_each}) == 1 else choose(of_each) for of_each in zip(*of_branches)]

    def _scan(self, scan: Scan, operands: list[int], depth: int) -> list[int]:
        consts, carry, xs = _split(operands, scan.num_consts, scan.num_carry)
        operation = ("scan", scan.length, scan.reverse)
        return self._loop(operation, scan.body, consts, carry, xs, roots=(), depth=depth)

    def _while(self, loop: While, operands: list[int], depth: int) -> list[int]:
        of_cond, of_body, carry = _split(operands, loop.num_cond_consts, loop.num_body_consts)
        goes_on = self.outputs(loop.cond, [*of_cond, *self._variables("carry", len(carry), depth)], depth + 1)
        return self._loop(("while",), loop.body, of_body, carry, [], roots=goes_on, depth=depth, cond=(loop, of_cond))

    def _loop(
        self,
        operation: tuple[Any, ...],
        body: Program,
        consts: list[int],
        carry: list[int],
        xs: list[int],
        roots: Sequence[int],
        depth: int,
        cond: tuple[While, list[int]] | None = None,
    ) -> list[int]:
        """For each output, the loop that computes it alone, with only the carried values that it depends on."""
        variables = [*self._variables("carry", len(carry), depth), *self._variables("x", len(xs), depth)]
        reads = [self._positions(term, depth) for term in self.outputs(body, [*consts, *variables], depth + 1)]
        always = set().union(*(self._positions(term, depth) for term in roots))
        results = []
        for k in range(len(body.outputs)):
            needed = {("carry", k)} if k < len(carry) else reads[k]
            needed = _closure(needed | always, reads)
            kept, read = ([p for kind, p in sorted(needed) if kind == name] for name in ("carry", "x"))
            unused = self._number("unused", ())
            names = dict(zip(kept, self._variables("carry", len(kept), depth)))
            of_carry = [names.get(p, unused) for p in range(len(carry))]
            names = dict(zip(read, self._variables("x", len(read), depth)))
            of_xs = [names.get(p, unused) for p in range(len(xs))]
            wanted = kept if k < len(carry) else [*kept, k]
            within = self.outputs(live_program(body, wanted), [*consts, *of_carry, *of_xs], depth + 1)
            if cond is not None:
                within += self.outputs(cond[0].cond, [*cond[1], *of_carry], depth + 1)
            result = kept.index(k) if k < len(carry) else len(kept)
            parts = (*(carry[p] for p in kept), *(xs[p] for p in read), *within)
            results.append(self._number((*operation, len(kept), len(read), result), parts))
        return results

    def _leaves_of(self, term: int) -> list[tuple[str, Any]]:
        """What a term depends on that is not computed: inputs and loop variables, each with its name."""
        found, seen, left = [], {term}, [term]
        while left:
            operation, parts = self._terms[left.pop()]
            if isinstance(operation, tuple) and operation[0] in ("input", "variable"):
                found.append(operation)
            new = set(parts) - seen
            seen |= new
            left += new
        return found

    def _variables(self, kind: str, n: int, depth: int) -> list[int]:
        """The variables that stand for what a loop's body is given in each iteration."""
        return [self._number(("variable", (kind, depth, position)), ()) for position in range(n)]

    def _positions(self, term: int, depth: int) -> set[tuple[str, int]]:
        """Which of these variables a term depends on."""
        names = [name for kind, name in self._leaves_of(term) if kind == "variable"]
        return {(kind, position) for kind, at, position in names if at == depth}

    def _constant(self, value: Any, dtype: Any) -> int:
        return self._number(("constant", str(dtype), self._value(value)), ())

    def _value(self, value: Any) -> Hashable:
        """An array by its numbers, if they are known."""
        try:
            array = np.asarray(value)
        except Exception:  # traced, or without numbers, such as a key
            return self._identity(value)
        return (array.shape, array.tobytes()) if array.dtype != object else self._identity(value)

    def _identity(self, value: Any) -> Hashable:
        self._by_identity.append(value)
        return ("identity", id(value))

    def _hashable(self, param: Any, depth: int) -> Hashable:
        """A key for a primitive's parameter, equal for equal ones. A program's is what it computes, without names."""
        if is_jaxpr(param):
            program = program_of(param)
            variables = self._variables("argument", len(program.inputs), depth)
            avals = tuple(str(program.avals[v]) for v in program.inputs)
            return ("program", avals, tuple(self.outputs(program, variables, depth + 1)))
        if isinstance(param, dict):
            return tuple((str(name), self._hashable(x, depth)) for name, x in sorted(param.items(), key=str))
        if type(param) in (tuple, list):
            return tuple(self._hashable(x, depth) for x in param)
        if isinstance(param, np.ndarray):
            return (str(param.dtype), self._value(param))
        try:
            hash(param)
        except TypeError:
            return self._identity(param)
        return param

    def _number(self, operation: Hashable, parts: Iterable[int]) -> int:
        term = (operation, tuple(parts))
        number = self._numbers.setdefault(term, len(self._terms))
        if number == len(self._terms):
            self._terms.append(term)
        return number


def _split(xs: list[int], first: int, second: int) -> tuple[list[int], list[int], list[int]]:
    return xs[:first], xs[first : first + second], xs[first + second :]


def _closure(needed: set[tuple[str, int]], reads: Sequence[set[tuple[str, int]]]) -> set[tuple[str, int]]:
    """Adds everything that the carried values among them are made from, in any iteration."""
    left = list(needed)
    while left:
        kind, position = left.pop()
        new = reads[position] - needed if kind == "carry" else set()
        needed = needed | new
        left += new
    return needed
