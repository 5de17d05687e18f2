"""Sequential quadratic programming by scipy, for inner problems with constraints."""

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
class SLSQP(AbstractInnerSolver):
    """argmin {g(y) : c(y) <= 0, e(y) = 0, A y = b, G y <= h, lower <= y <= upper} by `scipy.optimize.minimize`.

    Each step minimizes a quadratic model of the Lagrangian, whose curvature is learned from gradients, under the
    tangents of the constraints. What it ends with is completed by multipliers, least squares on what holds, and by
    Newton's method on the conditions with that as equalities, as long as it gains: y is then exact to rounding. g and
    the constraints need not be convex; the point found may be a local minimum.

    `Solved.residual` and the statuses are those of `InteriorPoint`, measured at the returned point, whatever scipy
    reports. One row of a batch after the other, each evaluation one of the whole batch: for single problems with up to
    some hundred y.

    Cost: a gradient of g and a backward pass for each entry of c and e a step, q^3 flops; and for the end a few times
    that of a step of `InteriorPoint`. Needs `pip install "bilevel[scipy]"`.

    Source: Kraft, "A software package for sequential quadratic programming", DFVLR-FB 88-28 (1988).

    Args:
        tol: of the violation; None: 1e-10, or 1e-5 in float32.
        max_steps: at most so many steps.

    Raises:
        ValueError: if `tol` or `max_steps` is negative.
        ImportError: from `solve`, without scipy.

    Example:
        >>> import torch
        >>> from bilevel import KKT, BilevelProblem, hypergradient
        >>> problem = BilevelProblem(
        ...     lambda x, y: y.sum(),
        ...     lambda x, y: (y - x).square().sum(),
        ...     inequalities=lambda x, y: y.square().sum() - 1,
        ... )
        >>> x, y0 = (
        ...     torch.tensor([3.0, 4.0], dtype=torch.float64),
        ...     torch.zeros(2, dtype=torch.float64),
        ... )
        >>> hypergradient(problem, x, y0, estimator=KKT(SLSQP())).y
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
        return minimized("SLSQP", self._row, objective, y0, self.tol, self.max_steps)

    @property
    def tolerance(self) -> float | None:
        return self.tol

    def with_tolerance(self, tol: float) -> SLSQP:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> SLSQP:
        return replace(self, max_steps=steps)

    def _row(self, optimize: Any, row: Row, start: Any) -> tuple[Any, int, bool]:
        constraints = []
        for kind, matrix, sign in (("eq", (row.A, row.b), 1.0), ("ineq", (row.G, row.h), -1.0)):
            constraints += _linear(kind, *matrix, sign) if len(matrix[0]) else []
        for kind, count, value, rows, sign in zip(("ineq", "eq"), row.counts, "ce", "CE", (-1.0, 1.0), strict=True):
            constraints += _curved(row, kind, value, rows, sign) if count else []
        found = optimize.minimize(
            row.value_and_gradient,
            start,
            jac=True,
            method="SLSQP",
            bounds=optimize.Bounds(row.lower, row.upper),
            constraints=constraints,
            options={"ftol": 1e-14, "maxiter": self.max_steps},
        )
        steps = int(found.get("nit", 0))  # there is none where all bounds meet
        return found.x, steps, steps >= self.max_steps


def _linear(kind: str, rows: Any, sides: Any, sign: float) -> list[dict[str, Any]]:
    return [{"type": kind, "fun": lambda y: sign * (rows @ y - sides), "jac": lambda _: sign * rows}]


def _curved(row: Row, kind: str, value: str, rows: str, sign: float) -> list[dict[str, Any]]:
    return [
        {"type": kind, "fun": lambda y: sign * row.part(y, value), "jac": lambda y: sign * row.part(y, rows)},
    ]
