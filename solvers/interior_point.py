"""Convex programs with nonlinear constraints: a batched primal-dual interior-point method with an exact end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._numerics.nonlinear_programs import NonlinearProgram, newton, run, start
from bilevel._numerics.quadratic_programs import violation
from bilevel._numerics.rows import matrix_times
from bilevel._result import Solved, Status, first_statuses
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, BELOW_1, demand_ranges
from bilevel.inner_problems.polytope import padded
from bilevel.requirements.properties import Feature
from bilevel.solvers._convex_program import ConvexProgram

_ENOUGH = 1e-6  # an error that tells which constraints hold; Newton's method on these does the rest


@final
@dataclass(frozen=True)
class InteriorPoint(AbstractInnerSolver):
    """argmin {g(y) : c(y) <= 0, e(y) = 0, A y = b, G y <= h, lower <= y <= upper}, by interior points.

    Every inequality has a slack. A primal-dual step towards the central path, predictor and corrector, is shortened
    until the residuals of the optimality conditions shrink; it may start anywhere. Where the matrix of a step is not
    definite on the null space of the constraints, as of a linear g or of one that is not convex, as little of the
    identity is added as makes it so. Once it is clear what holds, the conditions with these constraints as equalities
    are solved by Newton's method, so that y is exact to rounding and what holds does so exactly.

    For g and c convex and e affine this is the minimizer. For others it is a point that satisfies the optimality
    conditions, which may be a local minimum.

    `Solved.residual` is the largest relative violation of the optimality conditions at the returned point, as that of
    `QuadraticProgram` is, which is the faster one for linear constraints and a quadratic g.

    Statuses: `infeasible` with a certificate: multipliers w >= 0 such that w'c + v'e is positive and stationary, hence
    positive everywhere where c is convex; `unbounded` with a direction along which g falls and nothing is violated;
    `line_search_failed`, `stagnated` and `max_steps`; `nonfinite` where g or a constraint is, at the start.

    Cost a step: a gradient of g, q Hessian products, and a backward pass for each entry of c and e, and one or a few
    gradients for its length; it factors q + m + 2 k equations for k inequalities. Some 10 to 40 steps. Memory
    (q + k)^2 a problem. Linear algebra is in float64, also for a float32 problem. Rows of a batch are independent.

    Source: Boyd, Vandenberghe, "Convex optimization" (2004), section 11.7; Mehrotra, "On the implementation of a
    primal-dual interior point method", SIAM J. Optim. 2 (1992).

    Args:
        tol: of the violation; None: 1e-10, or 1e-5 in float32.
        max_steps: at most so many steps.

    Raises:
        ValueError: if `tol` or `max_steps` is negative.

    Example:
        >>> from bilevel import BilevelProblem, KKT, hypergradient
        >>> problem = BilevelProblem(
        ...     lambda x, y: y.sum(),
        ...     lambda x, y: (y - x).square().sum(),
        ...     inequalities=lambda x, y: y.square().sum() - 1,
        ... )
        >>> x, y0 = (
        ...     torch.tensor([3.0, 4.0], dtype=torch.float64),
        ...     torch.zeros(2, dtype=torch.float64),
        ... )
        >>> hypergradient(problem, x, y0, estimator=KKT(InteriorPoint())).y
        tensor([0.6000, 0.8000], dtype=torch.float64)
    """

    tol: float | None = None
    max_steps: int = 200

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, tol=BELOW_1, max_steps=AT_LEAST_0)

    @property
    def heeds(self) -> frozenset[Feature]:
        return frozenset({Feature.constraints, Feature.nonlinear_constraints})

    @property
    def forgets_start(self) -> bool:
        return True

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        tol = (1e-10 if y0.dtype == torch.float64 else 1e-5) if self.tol is None else self.tol
        program = ConvexProgram(objective, y0.detach())
        problem = NonlinearProgram(program.model, program.residuals, program.slacks)
        point, floor = start(problem, *program.start())
        point, _, steps, stuck = run(problem, point, max(_ENOUGH, tol * tol), self.max_steps, floor)
        best, left = newton(problem, point, floor)
        if bool((left > tol).any()) and int(steps.max()) < self.max_steps:
            point, _, more, stuck = run(problem, point, 0.0, self.max_steps - int(steps.max()), floor)
            steps = steps + torch.where(left > tol, more, torch.zeros_like(more))
            again, now = newton(problem, point, floor)
            best, left = again.where(now < left, best), torch.where(now < left, now, left)
        objective.tally.inner_steps += int(steps.sum())
        y = program.natural(best.y)
        model, flat, multipliers = program.finished(y, best.multipliers)
        gradient = padded(program.rows(objective.last_gradient(y)), flat)
        model = replace(model, q=gradient - matrix_times(model.Q, flat))
        error = violation(model, flat, multipliers, gradient, floor)
        unsolved, none = ~(error <= tol), torch.zeros_like(stuck)
        tried = bool(unsolved.any())
        cases = (
            (program.undefined() if tried else none, Status.nonfinite),
            (unsolved & (program.contradictory(y) if tried else none), Status.infeasible),
            (unsolved & (program.ray(y) if tried else none), Status.unbounded),
            (unsolved & (steps >= self.max_steps), Status.max_steps),
            (unsolved & stuck, Status.line_search_failed),
            (unsolved, Status.stagnated),
        )
        held = int(((flat >= model.upper) | (flat <= model.lower)).sum())
        shape = y0.shape[:-1]
        residual = error.reshape(shape).to(y0)
        multipliers = multipliers.reshape(*shape, -1).to(y0)
        return Solved(y, first_statuses(*cases), residual, int(steps.max()), held, multipliers)

    @property
    def tolerance(self) -> float | None:
        return self.tol

    def with_tolerance(self, tol: float) -> InteriorPoint:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> InteriorPoint:
        return replace(self, max_steps=steps)
