"""A user's formula for the inner solution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._result import Solved, judged_rows
from bilevel._tree import Tree
from bilevel._validate import demand_types
from bilevel.certificates.certificate import Constants
from bilevel.requirements.properties import Feature


@final
@dataclass(frozen=True)
class ClosedForm(AbstractInnerSolver):
    """y*(x) = solution(x), given by the user; also the way to differentiate at a y found elsewhere.

    Cost: one call of `solution`, and one gradient of g there, whose norm is the reported residual.

    Args:
        solution: `solution(x) -> y`, or `solution(x, data)` where g takes data, in the user's structures. It is
            called without a graph; implicit estimators do not differentiate it.

    Raises:
        ValueError: from `solve`, if what it returns does not have the structure of y, or there is no x.

    Example:
        >>> from bilevel import AID, BilevelProblem, hypergradient
        >>> from bilevel.solvers import Dense
        >>> problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x).square().sum())
        >>> aid = AID(inner=ClosedForm(lambda x: x), linear=Dense())
        >>> hypergradient(problem, torch.ones(2), torch.zeros(2), estimator=aid).grad
        tensor([1., 1.])
    """

    solution: Callable[..., Tree]

    def __post_init__(self) -> None:
        demand_types(self, {"solution": "a function x -> y"})

    @property
    def heeds(self) -> frozenset[Feature]:
        return frozenset(Feature)  # the formula is the user's

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        if objective.closed_form is None:
            raise ValueError(
                "`ClosedForm` needs an objective taken at some x; it cannot minimize a bare function of y."
            )
        with torch.no_grad():
            y = objective.closed_form(self.solution).detach().expand_as(y0).clone()
        residual = torch.linalg.vector_norm(objective.last_gradient(y), dim=-1)
        return Solved(y, judged_rows(residual, math.inf), residual, 0)

    def solution_bound(self, constants: Constants, distance: float) -> float:
        return 0.0
