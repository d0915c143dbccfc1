"""Signatures: equations that do the same have the same signature, whatever they are applied to."""

from collections.abc import Hashable
from functools import partial
from types import FunctionType
from typing import Any

from adalomo_jax.fused.plan.jaxpr import Equation, Program, called_as_it_is, has_own_derivative, pullback_of
from adalomo_jax.fused.plan.terms import Terms


class Signatures(Terms):
    """The signatures of equations, which are numbers.

    They are equal for the same primitive, with the same parameters, and inputs of the same types. If a function has its
    own derivative, what the derivative computes counts, too: each call of the function may bring another.
    """

    def __init__(self):
        super().__init__()
        self._within: list[FunctionType] = []

    def of(self, program: Program, equation: Equation) -> int:
        """An equation with an effect has a signature that no other has."""
        if equation.has_effects:
            return self._number(self._identity(equation), ())
        types = tuple(str(program.avals[v].strip_weak_type()) for v in equation.inputs)
        if has_own_derivative(equation):
            operation: Hashable = self._with_derivative(equation, depth=0)
        else:
            operation = self._hashable(equation.params, 0)
        return self._number((equation.source.primitive, operation, types, equation.context), ())

    def constant(self, program: Program, v: int) -> int:
        """The signature of a constant: equal if its numbers are."""
        return self._constant(program.constants[v], program.avals[v].dtype)

    def _results(self, equation: Equation, operands: list[int], depth: int) -> list[int]:
        if not has_own_derivative(equation):
            return super()._results(equation, operands, depth)
        operation = ("custom", self._with_derivative(equation, depth))
        return [self._number((*operation, i), operands) for i in range(len(equation.outputs))]

    def _with_derivative(self, equation: Equation, depth: int) -> Hashable:
        called = called_as_it_is(equation)
        if called is None:
            return self._identity(equation)
        try:
            pullback = pullback_of(equation)
        except Exception:  # cannot be traced by itself, as within a shard_map whose axis it names: equal to no other
            return self._identity(equation)
        variables = self._variables("argument", len(pullback.inputs), depth)
        return (self._hashable(called, depth), *self.outputs(pullback, variables, depth + 1))

    def _hashable(self, param: Any, depth: int) -> Hashable:
        """Functions are equal if the same lines made them from the same values, as a policy of ``jax.checkpoint``."""
        if isinstance(param, partial):
            return ("partial", *(self._hashable(x, depth) for x in (param.func, param.args, param.keywords)))
        if isinstance(param, (set, frozenset)):
            return ("set", frozenset(self._hashable(x, depth) for x in param))
        if isinstance(param, FunctionType) and param not in self._within:
            self._within.append(param)  # a function may lead back to itself
            contents = [cell.cell_contents for cell in param.__closure__ or ()]
            known = (contents, param.__defaults__, param.__kwdefaults__ or {})
            found = ("function", self._identity(param.__code__), *(self._hashable(x, depth) for x in known))
            self._within.pop()
            return found
        return super()._hashable(param, depth)
