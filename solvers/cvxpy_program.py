"""Quadratic programs by the solvers behind cvxpy."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock
from typing import Any, final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._numerics.interior_point import Point, Program
from bilevel._numerics.quadratic_programs import polished, violation
from bilevel._result import Solved, Status, judged
from bilevel._validate import demand_types
from bilevel.arguments.ranges import BELOW_1, demand_ranges
from bilevel.requirements.properties import Feature
from bilevel.solvers.quadratic_program import program_of, returned

# Far below what is asked for, as the violation is relative to other sizes than theirs.
_ACCURATE = {
    "CLARABEL": {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11},
    "OSQP": {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 200_000},
    "SCS": {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iters": 200_000},
}
_KEPT = 16  # compiled programs: of so many sizes and patterns of bounds


@final
@dataclass(frozen=True)
class Cvxpy(AbstractInnerSolver):
    """argmin {y'Qy / 2 + q'y : A y = b, G y <= h, lower <= y <= upper} by a solver of cvxpy.

    One row of a batch after the other. An independent check of `QuadraticProgram`, which is faster on batches. g must
    be quadratic: success is decided by the violation of the optimality conditions at the returned point, as it is
    there. The program is brought into standard form once for its size and the bounds that there are, with its numbers
    as parameters. What the solver finds is polished: the conditions with the bounds that seem to hold as equalities are
    solved directly, where that lowers the violation, so that y is exact to rounding unless many hold only just.

    Cost: q Hessian products and two gradients, the solver's, a square root of Q, and a factorization of q equations.
    Needs `pip install "bilevel[convex]"`. Memory: the standard forms of the last 16 sizes are kept.

    Args:
        tol: of the violation.
        solver: the name of an installed solver of cvxpy: "CLARABEL", "OSQP", "SCS".

    Raises:
        ValueError: if `tol` is negative.
        ImportError: from `solve`, without cvxpy.
    """

    tol: float = 1e-8
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
        found, multipliers = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
        found, multipliers = _polished(program, found, multipliers)
        y, flat, gradient = returned(objective, program, found, y0)
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
        """Y, multipliers of the equalities, and a status where there is no y."""
        cvxpy = _cvxpy()
        q, A, b, lower, upper = (
            part[row].cpu().numpy() for part in (program.q, program.A, program.b, program.lower, program.upper)
        )
        like, m = program.q[row], len(program.b[row])
        nowhere = torch.full_like(like, torch.nan), torch.full_like(program.b[row], torch.nan)
        parts = (program.Q, program.q, program.A, program.b)
        if not all(bool(part[row].isfinite().all()) for part in parts):
            return *nowhere, Status.nonfinite
        up, down = upper < float("inf"), lower > -float("inf")
        numbers = {"F": _root(program.Q[row]).cpu().numpy(), "q": q, "A": A, "b": b}
        numbers |= {"lower": lower[down], "upper": upper[up]}
        compiled = _compiled(len(q), m, down.tobytes(), up.tobytes(), self.solver)
        with compiled.lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a solution may be inaccurate: its violation is measured
            for name, parameter in compiled.parameters.items():
                parameter.value = numbers[name]
            try:
                compiled.problem.solve(solver=compiled.solver, **_ACCURATE.get(compiled.solver, {}))
            except cvxpy.SolverError:
                return *nowhere, Status.stagnated
            status, y = compiled.problem.status, compiled.y.value
            dual = compiled.equalities[0].dual_value if compiled.equalities else None
        if status in ("infeasible", "infeasible_inaccurate"):
            return *nowhere, Status.infeasible
        if status in ("unbounded", "unbounded_inaccurate"):
            return *nowhere, Status.unbounded
        if y is None:
            return *nowhere, Status.stagnated
        multipliers = (
            program.b[row] * 0 if dual is None else torch.as_tensor(dual, dtype=like.dtype, device=like.device)
        )
        return torch.as_tensor(y, dtype=like.dtype, device=like.device), multipliers.reshape(m), None


@final
@dataclass(frozen=True, eq=False)
class _Compiled:
    """A program in standard form, whose numbers are parameters; one thread sets them at a time."""

    problem: Any
    parameters: dict[str, Any]
    y: Any
    equalities: list[Any]
    solver: str  # cvxpy keeps the standard form for the last one
    lock: Lock


@lru_cache(_KEPT)
def _compiled(n: int, m: int, down: bytes, up: bytes, solver: str) -> _Compiled:
    """The program of n entries with m equalities, and bounds where `down` and `up` say so."""
    import numpy as np

    cvxpy = _cvxpy()
    y, F, q = cvxpy.Variable(n), cvxpy.Parameter((n, n)), cvxpy.Parameter(n)
    parameters, equalities, bounds = {"F": F, "q": q}, [], []
    if m:
        parameters |= {"A": cvxpy.Parameter((m, n)), "b": cvxpy.Parameter(m)}
        equalities.append(parameters["A"] @ y == parameters["b"])
    for name, which, sign in (("lower", down, -1.0), ("upper", up, 1.0)):
        bounded = np.frombuffer(which, dtype=bool)
        if bounded.any():
            parameters[name] = cvxpy.Parameter(int(bounded.sum()))
            bounds.append(sign * y[bounded] <= sign * parameters[name])
    # F'F = Q, as a quadratic form in a matrix that is a parameter is not affine in it.
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(F @ y) / 2 + q @ y), equalities + bounds)
    return _Compiled(problem, parameters, y, equalities, solver, Lock())


def _root(Q: Tensor) -> Tensor:
    """F with F'F the positive semidefinite part of Q."""
    values, vectors = torch.linalg.eigh((Q + Q.mT) / 2)
    root: Tensor = values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT
    return root


def _polished(program: Program, y: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor]:
    """With the bounds that seem to hold as equalities, in the rows where that is better."""
    lost = ~(y.isfinite().all(-1) & multipliers.isfinite().all(-1))
    if bool(lost.all()):
        return y, multipliers
    start, nu = (torch.where(lost.unsqueeze(-1), 0.0, part) for part in (y, multipliers))
    pull = program.gradient(start) + (program.A.mT @ nu.unsqueeze(-1)).squeeze(-1)
    limits = torch.stack([program.upper, -program.lower], -2)
    sign = pull.new_tensor([[1.0], [-1.0]])
    bounded = limits.isfinite()
    slacks = torch.where(bounded, (limits - sign * start.unsqueeze(-2)).clamp_min(0), 1.0)
    z = torch.where(bounded, (-sign * pull.unsqueeze(-2)).clamp_min(0), 0.0)
    found = polished(program, Point(start, nu, slacks, z))
    before = violation(program, start, nu, program.gradient(start))
    now = violation(program, found.y, found.multipliers, program.gradient(found.y))
    better = ((now < before) & ~lost).unsqueeze(-1)
    return torch.where(better, found.y, y), torch.where(better, found.multipliers, multipliers)


def _cvxpy() -> Any:
    try:
        import cvxpy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('`Cvxpy` needs cvxpy: pip install "bilevel[convex]"') from error
    return cvxpy
