"""Convex quadratic programs: a batched interior-point method with an exact end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._numerics.interior_point import Program
from bilevel._numerics.quadratic_programs import solve_program, violation
from bilevel._numerics.rows import matrix_times
from bilevel._result import Solved, Status, judged
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, BELOW_1, demand_ranges
from bilevel.inner_problems.polytope import FlatPolytope, padded
from bilevel.requirements.properties import Feature

# What another model must reduce the error to. Newton's method converges quadratically: where a model gains less than a
# tenth, it is either at the rounding floor or too far away to converge without a line search.
_LESS = 0.9


@final
@dataclass(frozen=True)
class QuadraticProgram(AbstractInnerSolver):
    """argmin {y'Qy / 2 + q'y : A y = b, G y <= h, lower <= y <= upper}: interior points, then the free set's equations.

    An inequality is an equality with a slack, one more unknown of the program. Mehrotra's predictor-corrector method
    finds which bounds hold, in some 10 to 20 steps whatever the size. The optimality conditions with these bounds as
    equalities are then solved directly; where that lowers the error, which it does unless many bounds hold only just, y
    is exact to rounding, and held entries are on their bounds exactly. Q positive definite on the null space of A on
    the free entries gives a unique y.

    A smooth g that is not quadratic is replaced by its quadratic model at y, again and again (Newton's method under
    constraints, without line search: it converges from a start that is near enough), as long as the error decreases.

    `Solved.residual` is the largest relative violation of the optimality conditions at the returned point, with the
    gradient of g itself: |grad g + A' multipliers| on the free entries, wrong signs of multipliers, |A y - b|, and
    distances of held entries from their bounds, relative to the largest entries of what cancels.

    Statuses: `infeasible` with a certificate (Farkas' lemma); `not_positive_definite` where Q is not;
    `stagnated` where rounding stops progress, or the models of a g that is not quadratic do not lead further.

    Cost: q Hessian products for Q, two gradients; a step factors q + m equations, q^3 / 3 flops. Memory q^2 a problem.
    Arithmetic is in float64, also for a float32 problem. Rows of a batch are independent.

    Source: Mehrotra, "On the implementation of a primal-dual interior point method", SIAM J. Optim. 2 (1992).

    Args:
        tol: of the error; None: 1e-10, or 1e-5 in float32.
        max_steps: at most so many interior-point steps for a model.
        max_models: at most so many quadratic models.

    Raises:
        ValueError: if `tol` or `max_steps` is negative, or `max_models` less than 1.

    Example:
        >>> from bilevel.inner_problems.polytope import Polytope
        >>> from bilevel._tree import ravel
        >>> y0 = torch.zeros(3, dtype=torch.float64)
        >>> simplex = Polytope(A=torch.ones(1, 3), b=1.0, lower=0.0).flat(ravel(y0)[1])
        >>> point = torch.tensor([0.5, 0.5, -1.0], dtype=torch.float64)
        >>> objective = Objective(lambda y: (y - point).square().sum(-1) / 2, constraints=simplex)
        >>> QuadraticProgram().solve(objective, y0).value
        tensor([0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """

    tol: float | None = None
    max_steps: int = 100
    max_models: int = 20

    def __post_init__(self) -> None:
        demand_types(self)
        # The violation that it is compared with is relative.
        demand_ranges(self, tol=BELOW_1, max_steps=AT_LEAST_0, max_models=AT_LEAST_1)

    @property
    def heeds(self) -> frozenset[Feature]:
        return frozenset({Feature.constraints})

    @property
    def forgets_start(self) -> bool:
        return True

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        tol = (1e-10 if y0.dtype == torch.float64 else 1e-5) if self.tol is None else self.tol
        y, before, steps, models = y0.detach(), torch.inf, 0, 0
        while True:
            models += 1
            program = program_of(objective, y)
            found = solve_program(program, tol, self.max_steps)
            y, flat, gradient = returned(objective, program, found.y, y0)
            error = violation(program, flat, found.multipliers, gradient)
            steps += int(found.steps.max())
            objective.tally.inner_steps += int(found.steps.sum())
            exhausted = found.steps >= self.max_steps
            known = torch.tensor([status is not None for status in found.statuses], device=error.device)
            left = error.masked_fill(known | exhausted | error.isnan(), 0)  # only another model could help these
            if models == self.max_models or not bool((left > tol).any()) or not float(left.max()) < _LESS * before:
                break
            before = float(left.max())
        rows = zip(found.statuses, error.tolist(), exhausted.tolist(), strict=True)
        statuses = tuple(
            judged(e, tol, Status.max_steps if spent else Status.stagnated) if status is None else status
            for status, e, spent in rows
        )
        held = int(((flat >= program.upper) | (flat <= program.lower)).sum())
        multipliers = found.multipliers.reshape(*y0.shape[:-1], -1).to(y0)
        return Solved(y, statuses, error.reshape(y0.shape[:-1]).to(y0), steps, held, multipliers)

    @property
    def tolerance(self) -> float | None:
        return self.tol

    def with_tolerance(self, tol: float) -> QuadraticProgram:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> QuadraticProgram:
        return replace(self, max_steps=steps)


def returned(objective: Objective, program: Program, found: Tensor, y0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The solution like y0, and (y, s) with the gradient of g there as rows of the program."""
    q = y0.shape[-1]
    y = found[..., :q].reshape(y0.shape).to(y0)
    gradient = objective.last_gradient(y).reshape(-1, q).to(found)
    flat = program.with_slacks(y.reshape(-1, q).to(found))
    return y, flat, padded(gradient, flat)


def program_of(objective: Objective, y0: Tensor) -> Program:
    """The quadratic g at y0 and its constraints, with one axis of rows, in float64; q Hessian products.

    Its entries are those of y and, after them, the slacks of inequalities.
    """
    _, gradient, hessian = objective.hessian(y0)
    polytope = objective.constraints
    if polytope is None:
        free = torch.full_like(y0, torch.inf)
        polytope = FlatPolytope(
            y0.new_zeros(*y0.shape[:-1], 0, y0.shape[-1]), y0.new_zeros(*y0.shape[:-1], 0), -free, free
        )
    n, dtype = y0.shape[-1], torch.float32 if y0.device.type == "mps" else torch.float64
    Q = hessian.dense(y0).reshape(-1, n, n).to(dtype)
    Q = (Q + Q.mT) / 2
    rows = len(Q)
    A, b, lower, upper = (
        part.detach()
        .expand(*y0.shape[:-1], *part.shape[part.dim() - k :])
        .reshape(rows, *part.shape[part.dim() - k :])
        .to(dtype)
        for part, k in zip(polytope.tensors(), (2, 1, 1, 1), strict=True)
    )
    q = gradient.reshape(rows, n).to(dtype) - matrix_times(Q, y0.reshape(rows, n).to(dtype))
    slacks = A.shape[-1] - n
    Q = torch.nn.functional.pad(Q, (0, slacks, 0, slacks)) if slacks else Q
    return Program(Q, padded(q, lower), A, b, lower, upper, slacks)
