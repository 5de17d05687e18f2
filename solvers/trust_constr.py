"""A trust-region interior-point method by scipy, for inner problems with constraints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._result import Solved
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, BELOW_1, demand_ranges
from bilevel.requirements.properties import Feature
from bilevel.solvers._scipy_programs import Row, minimized


@final
@dataclass(frozen=True)
class TrustConstr(AbstractInnerSolver):
    """argmin {g(y) : c(y) <= 0, e(y) = 0, A y = b, G y <= h, lower <= y <= upper} by `scipy.optimize.minimize`.

    Barrier problems in slacks, each by steps of sequential quadratic programming within a trust region, with the exact
    Hessian of the Lagrangian. As `SLSQP` in all else: the end by Newton's method, residual, statuses, batches. It takes
    more steps than that, and is the one for g and c whose curvature is ill conditioned, or not positive.

    Cost: a gradient and q Hessian products of g a step, and a backward pass for each entry of c and e. Needs
    `pip install "bilevel[scipy]"`.

    Source: Byrd, Hribar, Nocedal, "An interior point algorithm for large-scale nonlinear programming", SIAM J. Optim. 9
    (1999).

    Args:
        tol: of the violation; None: 1e-10, or 1e-5 in float32.
        max_steps: at most so many steps.

    Raises:
        ValueError: if `tol` or `max_steps` is negative.
        ImportError: from `solve`, without scipy.

    Example:
        >>> import torch
        >>> from bilevel import KKT, BilevelProblem, Polytope, hypergradient
        >>> nearest = BilevelProblem(
        ...     lambda x, y: y[0],
        ...     lambda x, y: (y - x).square().sum(),
        ...     constraints=lambda x: Polytope(lower=0.0),
        ... )
        >>> x, y0 = (
        ...     torch.tensor([1.0, -1.0], dtype=torch.float64),
        ...     torch.ones(2, dtype=torch.float64),
        ... )
        >>> hypergradient(nearest, x, y0, estimator=KKT(TrustConstr())).grad
        tensor([1., 0.], dtype=torch.float64)
    """

    tol: float | None = None
    max_steps: int = 1000

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
        return minimized("TrustConstr", self._row, objective, y0, self.tol, self.max_steps)

    @property
    def tolerance(self) -> float | None:
        return self.tol

    def with_tolerance(self, tol: float) -> TrustConstr:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> TrustConstr:
        return replace(self, max_steps=steps)

    def _row(self, optimize: Any, row: Row, start: Any) -> tuple[Any, int, bool]:
        least, none = -float("inf"), 0.0
        constraints = [optimize.LinearConstraint(row.A, row.b, row.b)] if len(row.A) else []
        constraints += [optimize.LinearConstraint(row.G, least, row.h)] if len(row.G) else []
        for count, value, rows, lower in zip(row.counts, "ce", "CE", (least, none), strict=True):
            constraints += [_curved(optimize, row, value, rows, lower)] if count else []
        found = optimize.minimize(
            row.value_and_gradient,
            start,
            jac=True,
            hess=row.hessian,
            method="trust-constr",
            bounds=optimize.Bounds(row.lower, row.upper),
            constraints=constraints,
            options={"gtol": 1e-10, "xtol": 1e-13, "barrier_tol": 1e-11, "maxiter": self.max_steps},
        )
        return found.x, int(found.get("nit", 0)), int(found.get("status", 1)) == 0  # none where all bounds meet


def _curved(optimize: Any, row: Row, value: str, rows: str, lower: float) -> Any:
    return optimize.NonlinearConstraint(
        lambda y: row.part(y, value),
        lower,
        0.0,
        jac=lambda y: row.part(y, rows),
        hess=lambda y, z: row.curvature(y, z, value),
    )
