"""Convex programs with many variables and many constraints, by products alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._numerics.rows import row_moduli, row_norms
from bilevel._result import Solved, Status, first_statuses
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, BELOW_1, demand_ranges
from bilevel.requirements.properties import Feature
from bilevel.solvers._multiplier_steps import Primal, Relaxed

_UNBOUNDED = 1e12  # times the size of the start
_ROUNDS = 60  # of multipliers; a few are usual
_LESS = 0.25  # what a round is to leave of the violation: else the weight grows
_GROWTH, _MOST = 10.0, 1e8  # of the weight, relative to the first
_NEAR = 0.1  # a violation from which Newton's method on what seems to hold is tried


@final
@dataclass(frozen=True)
class ProximalMultipliers(AbstractInnerSolver):
    """argmin {g(y) : c(y) <= 0, e(y) = 0, A y = b, G y <= h, lower <= y <= upper} for many y and many constraints.

    The proximal method of multipliers: with E all constraints, each over the length of its gradient, round k takes

        y_k ~ argmin_y g(y) + sum_i max(0, w_i + r E_i(y))^2 / (2 r) + s |y - y_{k-1}|^2 / 2,

    and then w <- max(0, w + r E(y_k)) (for equalities without the maximum). y_k is found by Newton's method: the
    function is convex, and quadratic on pieces where g is and E is affine; systems are solved by conjugate gradients
    with Hessian products and backward passes through E, and steps are shortened until the slope along them has shrunk.
    r grows where the violation does not fall to a quarter, s falls. Once it is seen what holds, Newton's method on the
    optimality conditions with that as equalities, by `MINRES`, is the exact end: it also drops and adds what its
    multipliers and distances say.

    It is for constraints that each see few others: where they join far entries in chains (differences of neighbors,
    flows, transport), information travels a link a product. `SparseInteriorPoint` factors such rows.

    `Solved.residual` is the largest violation of the optimality conditions at the returned point, relative to the
    sizes of y and of what cancels in the gradient, as that of `QuadraticProgram`. No strict convexity is needed: a
    linear program ends at a vertex where its solution is unique.

    Statuses: `infeasible` where the least squares of violations have a minimum above zero, which for convex c proves
    it; `diverged` where y grows endlessly; `not_positive_definite` where negative curvature was met on the way;
    `max_steps`; `stagnated`.

    Cost: nothing is q x q or q x k, memory that of g and the constraints. A Newton step takes as many products as
    conjugate gradients take steps, and those some root of the condition of L_yy + r E'E. Rows of a batch are
    independent. For up to some hundred y and constraints `QuadraticProgram` and `InteriorPoint` are faster.

    Source: Rockafellar, "Augmented Lagrangians and applications of the proximal point algorithm in convex programming",
    Math. Oper. Res. 1 (1976); for Newton's method in it Li, Sun, Toh, "A highly efficient semismooth Newton augmented
    Lagrangian method for solving Lasso problems", SIAM J. Optim. 28 (2018).

    Args:
        tol: of the violation; None: 1e-10, or 1e-5 in float32.
        max_steps: at most so many Newton steps.

    Raises:
        ValueError: if `tol` or `max_steps` is negative.

    Example:
        >>> from bilevel import BilevelProblem, hypergradient
        >>> from bilevel.inner_problems import ManyConstraints
        >>> disks = ManyConstraints(  # a thousand points, each in its disk
        ...     lambda x, y: (y - x).square().sum() / 2, lambda x, y: y.square().sum(-1) - 1
        ... )
        >>> x = torch.tensor([3.0, 4.0]).double().repeat(1000, 1)
        >>> hypergradient(
        ...     BilevelProblem(lambda x, y: y[0, 0], inner=disks), x, torch.zeros_like(x)
        ... ).grad[:2]
        tensor([[ 0.1280, -0.0960],
                [ 0.0000,  0.0000]], dtype=torch.float64)
    """

    tol: float | None = None
    max_steps: int = 500

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, tol=BELOW_1, max_steps=AT_LEAST_0)

    @property
    def heeds(self) -> frozenset[Feature]:
        return frozenset({Feature.constraints, Feature.nonlinear_constraints, Feature.many_constraints})

    @property
    def forgets_start(self) -> bool:
        return True

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        tol = (1e-10 if y0.dtype == torch.float64 else 1e-5) if self.tol is None else self.tol
        relaxed = Relaxed.of(objective, y0)
        at = best = relaxed.start(y0)
        weight = first = relaxed.curvature(at.y)
        near, steps, concave = 1e-2 * weight, 0, torch.zeros_like(best.error, dtype=torch.bool)
        for _ in range(_ROUNDS):
            open_ = (best.error > tol) & (row_moduli(at.y).squeeze(-1) < _UNBOUNDED * (1 + row_moduli(y0).squeeze(-1)))
            if not bool(open_.any()) or steps >= self.max_steps:
                break
            before = at
            at, taken, bent = relaxed.round(at, weight, near, open_, self.max_steps - steps)
            steps, concave = steps + taken, concave | bent
            best = at.better(best)
            if bool((at.error[open_] < _NEAR).any()):
                ended, taken = relaxed.newton(at, tol, self.max_steps - steps)
                steps += taken
                best = ended.better(best)
                at = ended.where((ended.error < 0.5 * at.error).unsqueeze(-1), at)
            slow = (at.feasibility > _LESS * before.feasibility) & (at.feasibility > tol)
            weight = torch.where(slow.unsqueeze(-1), weight * _GROWTH, weight).clamp_max(_MOST * first)
            near = near * 0.3
        objective.tally.inner_steps += steps * best.error.numel()
        return self._ended(objective, relaxed, best, y0, steps, tol, concave)

    def _ended(
        self,
        objective: Objective,
        relaxed: Relaxed,
        best: Primal,
        y0: Tensor,
        steps: int,
        tol: float,
        concave: Tensor,
    ) -> Solved:
        unsolved = ~(best.error <= tol)
        nothing = torch.zeros_like(unsolved)
        infeasible = relaxed.contradictory(best.y) if bool(unsolved.any()) else nothing
        far = row_norms(best.y) > 1e-3 * _UNBOUNDED * (1 + row_norms(y0))
        objective.last_gradient(best.y)
        statuses = first_statuses(
            (unsolved & infeasible, Status.infeasible),
            (~best.error.isfinite(), Status.nonfinite),
            (unsolved & far, Status.diverged),
            (unsolved & concave, Status.not_positive_definite),
            (unsolved & torch.full_like(unsolved, steps >= self.max_steps), Status.max_steps),
            (unsolved, Status.stagnated),
        )
        held = int(((best.y <= relaxed.lower) | (best.y >= relaxed.upper)).sum())
        return Solved(best.y, statuses, best.error, steps, held, relaxed.multipliers(best))

    @property
    def tolerance(self) -> float | None:
        return self.tol

    def with_tolerance(self, tol: float) -> ProximalMultipliers:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> ProximalMultipliers:
        return replace(self, max_steps=steps)
