"""Newton's method with preconditioned conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective, unbounded
from bilevel._linear import AbstractPreconditioner, LinearOperator
from bilevel._numerics.conjugate_gradients import Precondition, conjugate_gradients
from bilevel._numerics.krylov import solve_by_one_run
from bilevel._numerics.rows import row_dots
from bilevel._result import Solved, Status
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, demand_ranges
from bilevel.bounds.iterations import stationary
from bilevel.certificates.certificate import Constants
from bilevel.solvers.armijo import Along, Armijo, Idleness, ends, final_statuses, rescaled, rounding, stops

_FIRST = 0.1  # of |grad g|: what the first system is solved to
_POWER = 1.5  # of the ratio of two gradients: what the others are
_LAST = 0.25  # of the tolerance: to more than this no system is solved


@final
@dataclass(frozen=True)
class NewtonPCG(AbstractInnerSolver):
    """y <- y - t d with H d = grad g(y) to |H d - grad g| <= eta |grad g|, by preconditioned conjugate gradients.

    eta = min(0.1, (|grad g| / |grad g before|)^1.5), but not less than a quarter of the tolerance needs; t by Armijo's
    rule from t = 1, where a trial is an expansion to second order: one that is taken is the next point. For a g that
    knows its own derivatives (`bilevel.problems.glm`), whose expansions cost a gradient and whose diagonal is known,
    this is the solver: from a warm start one or two steps of few products, and what it ends with is what implicit
    differentiation goes on with. For any other g a trial is a gradient with its graph, and `Newton` the cheaper one
    where steps are shortened.

    Converges to a stationary point of a smooth g that is bounded below, and near a strict minimum superlinearly. A
    direction of negative curvature ends the conjugate gradients at what they had; where that is nothing it is -grad g.

    Cost of a step: one gradient, and the products of the system, whose residual is taken at its word. Rows of a batch
    have their own directions, tolerances and step lengths; each call evaluates, and counts, all rows.

    With tol = 0 it goes on for `max_steps` steps or to the rounding floor, and both are success.

    Source: Dembo, Eisenstat, Steihaug, "Inexact Newton methods", SIAM J. Numer. Anal. 19 (1982); Eisenstat, Walker,
    "Choosing the forcing terms in an inexact Newton method", SIAM J. Sci. Comput. 17 (1996), choice 2.

    Args:
        tol: stop when |grad g| <= tol.
        max_steps: at most this many steps.
        preconditioner: of the systems, such as `Jacobi()`. None: the diagonal of H where g knows it, else none.
        products: at most so many of a system.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> objective = Objective(lambda y: (y - 3).square().sum() / 2)
        >>> NewtonPCG().solve(objective, torch.zeros(2)).value
        tensor([3., 3.])
    """

    tol: float = 1e-8
    max_steps: int = 100
    preconditioner: AbstractPreconditioner | None = None
    products: int = 1000

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, tol=AT_LEAST_0, max_steps=AT_LEAST_0, products=AT_LEAST_1)

    @property
    def forgets_start(self) -> bool:
        return self.tol > 0

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        y, search = y0.detach().clone(), Armijo()
        value, gradient, hessian = objective.hessian(y)
        again = rescaled(
            lambda multiple, tol: replace(self, tol=tol).solve(multiple, y0), objective, gradient, self.tol
        )
        if again is not None:
            return again
        lead, steps = y.shape[:-1], 0
        status: list[Status | None] = [None] * lead.numel()
        progress, before = Idleness(value), None
        while True:
            norm = torch.linalg.vector_norm(gradient, dim=-1)
            progress.see(value, norm)
            status = ends(status, value, norm, progress.idle, self.tol)
            active = torch.tensor([s is None for s in status], device=y.device).reshape(lead)
            if steps == self.max_steps or not active.any():
                break
            d = self._direction(hessian, torch.where(active.unsqueeze(-1), gradient, 0.0), norm, before)
            slope = row_dots(gradient, d)
            descends = (slope < 0).unsqueeze(-1) & d.isfinite().all(-1, keepdim=True)
            d = torch.where(descends, d, -gradient)
            at = Along(y, value, d, row_dots(gradient, d))
            t, pending = active.to(value.dtype), active
            trial, found = y, (value, gradient, hessian)
            for halvings in range(search.max_halvings + 1):
                trial = torch.addcmul(y, t.unsqueeze(-1), d)
                found = objective.hessian(trial)
                pending = active & ~_enough(at, t, d, found[0], found[1], search.slope)
                if not pending.any() or halvings == search.max_halvings:
                    break
                t = torch.where(pending, search.shrink * t, t)
            if pending.any():  # back to where they were, and why
                status = stops(status, pending, at, t)
                trial = torch.where(pending.unsqueeze(-1), y, trial)
                found = objective.hessian(trial)
            moved, before = active & ~pending, norm
            y, (value, gradient, hessian) = trial, found
            objective.tally.inner_steps += int(moved.sum())
            steps += int(moved.any())
        return Solved(y, final_statuses(status, self.tol), norm, steps)

    @property
    def tolerance(self) -> float | None:
        return self.tol or None

    def with_tolerance(self, tol: float) -> NewtonPCG:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> NewtonPCG:
        return replace(self, max_steps=steps)

    def solution_bound(self, constants: Constants, distance: float) -> float:
        if not self.tol:
            raise unbounded(self, "bounds.gradient_descent")
        return stationary(constants, self.tol)

    def _direction(self, hessian: LinearOperator, gradient: Tensor, norm: Tensor, before: Tensor | None) -> Tensor:
        """-H^-1 grad g, to the accuracy that each row needs."""
        eta = torch.full_like(norm, _FIRST) if before is None else (norm / before).pow(_POWER).clamp(max=_FIRST)
        eta = torch.maximum(eta, _LAST * self.tol / norm).clamp(max=0.5)
        eta = torch.where(eta.isfinite(), eta, 0.5)
        run = partial(conjugate_gradients, precondition=self._preconditioned(hessian, gradient))
        rtols = eta.reshape(-1).tolist()
        found = solve_by_one_run(run, hessian, gradient, None, rtol=rtols, max_steps=self.products)
        return -found.value

    def _preconditioned(self, hessian: LinearOperator, like: Tensor) -> Precondition:
        if self.preconditioner is not None:
            return self.preconditioner.build(hessian, like)
        known = hessian.known_diagonal
        if known is None:
            return None
        floor = torch.finfo(like.dtype).eps * known.amax(-1, keepdim=True)
        inverse = torch.maximum(known, torch.where(floor > 0, floor, 1.0)).reciprocal()
        return lambda r: inverse * r


def _enough(at: Along, t: Tensor, d: Tensor, value: Tensor, gradient: Tensor, share: float) -> Tensor:
    """Armijo's condition, by gradients where the decrease to be expected is lost in the rounding of the values."""
    noise = rounding(at.value)
    fine = t * -at.slope <= noise
    level = (value <= at.value + noise) & (row_dots(gradient, d) <= (2 * share - 1) * at.slope)
    return torch.where(fine, level, value <= at.value + share * t * at.slope)
