"""Quadratic programs by the solvers behind cvxpy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._numerics.interior_point import Program
from bilevel._numerics.quadratic_programs import violation
from bilevel._result import Solved, Status, judged
from bilevel._validate import demand_types
from bilevel.arguments.ranges import BELOW_1, demand_ranges
from bilevel.requirements.properties import Feature
from bilevel.solvers.quadratic_program import program_of, returned


@final
@dataclass(frozen=True)
class Cvxpy(AbstractInnerSolver):
    """argmin {y'Qy / 2 + q'y : A y = b, G y <= h, lower <= y <= upper} by a solver of cvxpy.

    One row of a batch after the other. An independent check of `QuadraticProgram`, which is faster on batches. g must
    be quadratic: success is decided by the violation of the optimality conditions at the returned point, as it is
    there. Solutions are accurate to the solver's own tolerance, and held entries off their bounds by as much.

    Cost: q Hessian products and two gradients, and the solver's. Needs `pip install "bilevel[convex]"`.

    Args:
        tol: of the violation.
        solver: the name of an installed solver of cvxpy: "CLARABEL", "OSQP", "SCS".

    Raises:
        ValueError: if `tol` is negative.
        ImportError: from `solve`, without cvxpy.
    """

    tol: float = 1e-6
    solver: str = "CLARABEL"

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, tol=BELOW_1)

    @property
    def heeds(self) -> frozenset[Feature]:
        return frozenset({Feature.constraints})

    @property
    def forgets_start(self) -> bool:
        return True

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        program = program_of(objective, y0)
        rows = [self._solve_row(program, i) for i in range(len(program.q))]
        multipliers = torch.stack([row[1] for row in rows])
        y, flat, gradient = returned(objective, program, torch.stack([row[0] for row in rows]), y0)
        error = violation(program, flat, multipliers, gradient)
        statuses = tuple(
            judged(e, self.tol, Status.stagnated) if status is None else status
            for e, (_, _, status) in zip(error.tolist(), rows, strict=True)
        )
        held = int(((flat >= program.upper) | (flat <= program.lower)).sum())
        shape = y0.shape[:-1]
        return Solved(y, statuses, error.reshape(shape).to(y0), 1, held, multipliers.reshape(*shape, -1).to(y0))

    def with_tolerance(self, tol: float) -> Cvxpy:
        return replace(self, tol=tol)

    def _solve_row(self, program: Program, row: int) -> tuple[Tensor, Tensor, Status | None]:
        cvxpy = _cvxpy()
        Q, q, A, b, lower, upper = (
            part[row].cpu().numpy()
            for part in (program.Q, program.q, program.A, program.b, program.lower, program.upper)
        )
        y = cvxpy.Variable(len(q))
        equalities = [A @ y == b] if len(A) else []
        sides = [(limit, limit < float("inf"), sign) for limit, sign in ((upper, 1.0), (-lower, -1.0))]
        bounds = [sign * y[finite] <= limit[finite] for limit, finite, sign in sides if finite.any()]
        objective = cvxpy.Minimize(cvxpy.quad_form(y, cvxpy.psd_wrap(Q)) / 2 + q @ y)
        problem = cvxpy.Problem(objective, equalities + bounds)
        problem.solve(solver=self.solver)
        like = program.q[row]
        none = torch.full_like(like, torch.nan), torch.full_like(program.b[row], torch.nan)
        if problem.status in ("infeasible", "infeasible_inaccurate"):
            return *none, Status.infeasible
        if y.value is None:
            return *none, Status.not_positive_definite  # unbounded below
        dual = (
            torch.as_tensor(equalities[0].dual_value, dtype=like.dtype, device=like.device) if equalities else none[1]
        )
        return (
            torch.as_tensor(y.value, dtype=like.dtype, device=like.device).reshape(like.shape),
            dual.reshape(program.b[row].shape),
            None,
        )


def _cvxpy() -> Any:
    try:
        import cvxpy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('`Cvxpy` needs cvxpy: pip install "bilevel[convex]"') from error
    return cvxpy
