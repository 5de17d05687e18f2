"""Convex programs with many variables and sparse rows: an interior-point method on sparse factors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._result import Solved, Status
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, BELOW_1, demand_ranges
from bilevel.requirements.properties import Feature
from bilevel.solvers._multiplier_steps import Relaxed
from bilevel.solvers._sparse_program import SparseProgram
from bilevel.solvers._sparse_saddle import scipy_sparse

_UNBOUNDED = 1e9  # times the size of the start


@final
@dataclass(frozen=True)
class SparseInteriorPoint(AbstractInnerSolver):
    """argmin {g(y) : A y = b, G y <= h, lower <= y <= upper} for sparse A and G, many y and many rows, g convex.

    Mehrotra's predictor-corrector method: some 10 to 60 steps whatever the size. A step solves

        [[H + D, A', G'], [A, 0, 0], [G, 0, -E]] (dy, dnu, dz) = r

    with diagonal D and E from the slacks. The matrix with the diagonal of H in the place of H is factored by scipy, and
    conjugate gradients with Hessian products correct what H is beside its diagonal, so that H is never formed: one
    product where it is diagonal or zero, few where it is dominated by it. Newton's method with what seems to hold as
    equalities, on the same factors, is the exact end.

    Constraints that join far entries in chains (differences of neighbors, flows, transport) are what this is for:
    products alone, as in `ProximalMultipliers`, take as many steps as the chains are long.

    `Solved.residual` is the largest violation of the optimality conditions, as that of `QuadraticProgram`. Statuses:
    `infeasible` with a certificate (Farkas' lemma, or a stationary point of the violations); `diverged` where y grows
    endlessly; `not_positive_definite` where H is not; `max_steps`; `stagnated`.

    Cost: a sparse factorization a step, and the products of conjugate gradients. One problem at a time, in float64 on
    the CPU. Needs `pip install "bilevel[scipy]"`.

    Source: Mehrotra, "On the implementation of a primal-dual interior point method", SIAM J. Optim. 2 (1992).

    Args:
        tol: of the violation; None: 1e-10, or 1e-5 in float32.
        max_steps: at most so many interior-point steps.

    Raises:
        ValueError: if `tol` or `max_steps` is negative; from `solve`, if the constraints are not known as sparse rows,
            or there are several problems.
        ImportError: from `solve`, without scipy.

    Example:
        >>> from bilevel import BilevelProblem, Polytope, hypergradient
        >>> from bilevel.inner_problems import ManyConstraints
        >>> q = 1000
        >>> at = torch.arange(q - 1)  # row i is y[i] - y[i + 1]
        >>> G = torch.sparse_coo_tensor(
        ...     torch.stack([at.repeat(2), torch.cat([at, at + 1])]),
        ...     torch.tensor([1.0, -1.0]).double().repeat_interleave(q - 1),
        ...     check_invariants=True,
        ... )
        >>> rising = ManyConstraints(
        ...     lambda x, y: (y - x).square().sum() / 2, constraints=lambda x: Polytope(G=G, h=0.0)
        ... )
        >>> x = torch.arange(q).flip(0).double()  # falling: all y are the mean
        >>> hypergradient(
        ...     BilevelProblem(lambda x, y: y[0], inner=rising), x, torch.zeros(q).double()
        ... ).grad[:2]
        tensor([0.0010, 0.0010], dtype=torch.float64)
    """

    tol: float | None = None
    max_steps: int = 200

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, tol=BELOW_1, max_steps=AT_LEAST_0)

    @property
    def heeds(self) -> frozenset[Feature]:
        return frozenset({Feature.many_constraints})

    @property
    def forgets_start(self) -> bool:
        return True

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        sparse = scipy_sparse("SparseInteriorPoint")
        tol = (1e-10 if y0.dtype == torch.float64 else 1e-5) if self.tol is None else self.tol
        own = objective.nonlinear
        if own is None or own.sparse is None or y0.dim() > 1:
            raise ValueError(
                "`SparseInteriorPoint` solves one problem whose constraints are rows, some of them a sparse tensor:"
                " `ManyConstraints(g, constraints=lambda x: Polytope(G=...))` without tasks. Got"
                f" {'several problems at once' if y0.dim() > 1 else 'constraints that are functions, or dense'}."
                " Use `ProximalMultipliers`."
            )
        relaxed = Relaxed.of(objective, y0)
        program = SparseProgram.of(sparse, relaxed, own.sparse, y0)
        ended = program.run(y0, tol, self.max_steps)
        best = relaxed.measured(ended.y, ended.w)
        best, _ = relaxed.newton(best, tol, self.max_steps, program.end)
        objective.tally.inner_steps += ended.steps
        objective.last_gradient(best.y)
        error = float(best.error)
        status = Status.successful
        if not error <= tol:
            far = float(best.y.abs().max()) > _UNBOUNDED * (1 + float(y0.abs().max()))
            proven = ended.contradictory or bool(relaxed.contradictory(best.y))
            status = (
                Status.infeasible
                if proven
                else Status.nonfinite
                if not bool(best.error.isfinite())
                else Status.diverged
                if far
                else Status.not_positive_definite
                if ended.concave
                else Status.max_steps
                if ended.steps >= self.max_steps
                else Status.stagnated
            )
        held = int(((best.y <= relaxed.lower) | (best.y >= relaxed.upper)).sum())
        return Solved(best.y, (status,), best.error, ended.steps, held, relaxed.multipliers(best))

    @property
    def tolerance(self) -> float | None:
        return self.tol

    def with_tolerance(self, tol: float) -> SparseInteriorPoint:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> SparseInteriorPoint:
        return replace(self, max_steps=steps)
