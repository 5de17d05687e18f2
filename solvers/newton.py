"""Newton's method with conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective, unbounded
from bilevel._linear import AbstractLinearSolver, LinearOperator
from bilevel._numerics.rows import row_dots
from bilevel._result import Solved, Status
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, demand_ranges
from bilevel.bounds.iterations import stationary
from bilevel.certificates.certificate import Constants
from bilevel.solvers.armijo import Along, Armijo, Idleness, ends, final_statuses, rescaled, stops
from bilevel.solvers.cg import solve_rows


@final
@dataclass(frozen=True)
class Newton(AbstractInnerSolver):
    """Newton-CG: y <- y - t d with H d = grad g(y) solved to |H d - grad g| <= min(1/2, sqrt |grad g|) |grad g|.

    t by Armijo's rule from t = 1. Converges to a stationary point of a smooth g that is bounded below, and near a
    strict minimum superlinearly, with order 3/2. Where CG meets negative curvature, the direction is what it had
    found until then, or -grad g if that is nothing; both are directions of descent.

    Cost of a step: one gradient with its graph, the Hessian products of the linear solver and its one for the true
    residual, and one value a trial (one, near the solution). The gradient at the returned point is known. Memory
    O(q) and the graph of one gradient. Rows of a batch have their own directions, tolerances and step lengths; each
    call evaluates, and counts, all rows.

    With tol = 0 it goes on for `max_steps` steps or to the rounding floor, and both are success.

    Source: Dembo, Eisenstat, Steihaug, "Inexact Newton methods", SIAM J. Numer. Anal. 19 (1982); Nocedal, Wright,
    "Numerical optimization" (2006), algorithm 7.1.

    Args:
        tol: stop when |grad g| <= tol.
        max_steps: at most this many steps.
        linear: solves H d = grad g instead: `Dense()` for small q, where quadratics then take one step. None: CG.

    Raises:
        ValueError: if `tol` or `max_steps` is negative.

    Example:
        >>> from bilevel.solvers import Dense
        >>> objective = Objective(lambda y: (y - 3).square().sum() / 2)
        >>> Newton(linear=Dense()).solve(objective, torch.zeros(2)).value
        tensor([3., 3.])
    """

    tol: float = 1e-8
    max_steps: int = 100
    linear: AbstractLinearSolver | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, tol=AT_LEAST_0, max_steps=AT_LEAST_0)

    @property
    def forgets_start(self) -> bool:
        return self.tol > 0

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        y, search = y0.detach().clone(), Armijo()
        lead, steps = y.shape[:-1], 0
        status: list[Status | None] = [None] * lead.numel()
        progress: Idleness | None = None
        while True:
            value, gradient, hessian = objective.hessian(y)
            if progress is None:
                again = rescaled(
                    lambda multiple, tol: replace(self, tol=tol).solve(multiple, y0), objective, gradient, self.tol
                )
                if again is not None:
                    return again
            norm = torch.linalg.vector_norm(gradient, dim=-1)
            progress = Idleness(value) if progress is None else progress
            progress.see(value, norm)
            status = ends(status, value, norm, progress.idle, self.tol)
            active = torch.tensor([s is None for s in status], device=y.device).reshape(lead)
            if steps == self.max_steps or not active.any():
                break
            rhs = torch.where(active.unsqueeze(-1), gradient, torch.zeros_like(gradient))
            d = -self._direction(hessian, rhs, norm)
            slope = row_dots(gradient, d)
            descends = (slope < 0).unsqueeze(-1) & d.isfinite().all(-1, keepdim=True)
            d = torch.where(descends, d, -gradient)
            at = Along(y, value, d, row_dots(gradient, d))
            t = torch.ones_like(value)
            tried, found = search.search(objective, at, t, active)
            status = stops(status, active & ~found, at, t)
            y = torch.where(found.unsqueeze(-1), torch.addcmul(y, tried.unsqueeze(-1), d), y)
            objective.tally.inner_steps += int(found.sum())
            steps += int(found.any())
            if not found.any():
                break
        return Solved(y, final_statuses(status, self.tol), norm, steps)

    @property
    def tolerance(self) -> float | None:
        return self.tol or None

    def with_tolerance(self, tol: float) -> Newton:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> Newton:
        return replace(self, max_steps=steps)

    def solution_bound(self, constants: Constants, distance: float) -> float:
        if not self.tol:
            raise unbounded(self, "bounds.gradient_descent")
        return stationary(constants, self.tol)

    def _direction(self, hessian: LinearOperator, gradient: Tensor, norm: Tensor) -> Tensor:
        """H^-1 grad g, to the accuracy that each row needs."""
        if self.linear is not None:
            return self.linear.solve(hessian, gradient).value
        return solve_rows(hessian, gradient, [min(0.5, each**0.5) for each in norm.reshape(-1).tolist()]).value
