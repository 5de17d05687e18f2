"""A user's formula for the inner solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._numerics.rows import matrix_times, row_maxima, safe_row_norms
from bilevel._result import Solved, Status, first_statuses
from bilevel._tree import Tree
from bilevel._validate import demand_types
from bilevel.certificates.certificate import Constants
from bilevel.inner_problems.activity import Activity
from bilevel.inner_problems.polytope import padded
from bilevel.requirements.properties import Feature

_FAR = 1e-3  # of |y|: between what rounding and a y found elsewhere are off by, and a formula that is another one


@final
@dataclass(frozen=True)
class ClosedForm(AbstractInnerSolver):
    """y*(x) = solution(x), given by the user; also the way to differentiate at a y found elsewhere.

    What it returns is taken at its word, but for a sanity bound: where |grad_y g| is more than it changes over a
    thousandth of |y|, or in the same sense a constraint or a proximal step is missed, y is no solution, and the status
    is `not_a_solution`. An iteration, whose y solves nothing, is not looked at.

    Cost: one call of `solution`, one gradient of g there, whose norm is the reported residual, and, unless that is
    zero, one nearby; two where y seems to be no solution, since on a kink of g a gradient is no residual.

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

    @property
    def forgets_start(self) -> bool:
        return True

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        if objective.closed_form is None:
            raise ValueError(
                "`ClosedForm` needs an objective taken at some x; it cannot minimize a bare function of y."
            )
        with torch.no_grad():
            y = objective.closed_form(self.solution).detach().expand_as(y0).clone()
        gradient = objective.last_gradient(y)
        residual = torch.linalg.vector_norm(gradient, dim=-1)
        missed = _missed(objective, y, gradient)
        statuses = first_statuses((~residual.isfinite(), Status.nonfinite), (missed, Status.not_a_solution))
        return Solved(y, statuses, residual, 0)

    def solution_bound(self, constants: Constants, distance: float) -> float:
        return 0.0


def _missed(objective: Objective, y: Tensor, gradient: Tensor) -> Tensor:
    """The rows `(*batch,)` in which y is off its solution by more than a thousandth of |y|, as far as can be seen."""
    if not objective.solves or (objective.is_plain and not bool(gradient.any())):
        return torch.zeros(y.shape[:-1], dtype=torch.bool, device=y.device)
    reach = _FAR * torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    reach = torch.where(reach > 0, reach, torch.full_like(reach, _FAR))
    signs = torch.ones(y.shape[-1], dtype=y.dtype, device=y.device)
    signs[1::2] = -1
    nearby = y + reach * y.shape[-1] ** -0.5 * signs
    change = objective.gradient(nearby) - gradient
    allowed = safe_row_norms(change)
    if objective.prox is not None:
        step = reach / allowed.unsqueeze(-1).clamp_min(torch.finfo(y.dtype).tiny)  # about 1 / L
        with torch.no_grad():
            moved = y - objective.prox(y - step * gradient, step)
        return safe_row_norms(moved) > reach.squeeze(-1)
    if objective.constraints is None:
        missed = safe_row_norms(gradient) > allowed
        if not bool(missed.any()):
            return missed
        # On a kink of g a gradient is no residual: there it jumps to one of the sides.
        other = safe_row_norms(objective.gradient(2 * y - nearby) - gradient)
        return missed & (safe_row_norms(gradient) > other)
    A, b, lower, upper = objective.constraints.tensors()
    y = objective.constraints.with_slacks(y)
    gradient, change = padded(gradient, y), padded(change, y)
    found = Activity.of(objective.constraints, y, gradient, change, None)
    pull = gradient + matrix_times(A.mT, found.multipliers)
    outwards = torch.where(found.upper, pull, -pull).clamp_min(0.0)  # as held entries are to push
    pull = torch.where(found.free, pull, outwards)
    pull = torch.where(objective.constraints.fixed, 0.0, pull)
    outside = torch.maximum(lower - y, y - upper)
    off = matrix_times(A, y) - b
    most = _FAR * (b.abs() + matrix_times(A.abs(), y.abs()))
    broken = (row_maxima(outside) > reach.squeeze(-1)) | (off.abs() > most).any(-1)
    return broken | (safe_row_norms(pull) > allowed)
