"""Cone programs by Clarabel, an interior-point method, with a Newton end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._numerics.cone_programs import ConePoint, ConeProgram
from bilevel._numerics.cones import Cone
from bilevel._result import Solved, Status, judged
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, BELOW_1, demand_ranges
from bilevel.requirements.properties import Feature

_LIMITS = {"MaxIterations": Status.max_steps, "MaxTime": Status.max_steps}


@final
@dataclass(frozen=True)
class Clarabel(AbstractInnerSolver):
    """y = E z + e, z = argmin {z'Pz / 2 + c'z : A z + s = b, s in K}: the inner problems that `from_cvxpy` makes.

    Clarabel's interior-point method takes the numbers of the program as they are at x; nothing is canonicalized again.
    Then Newton's method on P z + c + A'(Pi(v) - v) / t = 0, A z + Pi(v) = b, with Pi the projection onto K, as long as
    it gains: quadratically where y*(x) is differentiable, so that y is exact to rounding. One row of a batch after the
    other; Newton's method on all at once.

    `Solved.residual` is the largest entry of these residuals, relative to the largest of what cancels in them.

    Statuses: `infeasible` and `unbounded`, with a certificate of Clarabel's; `max_steps`; `stagnated` where it ends
    otherwise and the residual is above the tolerance.

    Cost: Clarabel's, some 10 to 30 sparse factorizations; two to five Newton steps factor n equations densely, n^3 / 3
    flops each. Memory n^2 + n m a problem. Needs `pip install "bilevel[convex]"`.

    Source: Goulart, Chen, "Clarabel: an interior-point solver for conic programs with quadratic objectives",
    arXiv:2405.12762 (2024); Ali, Wong, Kolter, "A semismooth Newton method for fast, generic convex programming", ICML
    2017.

    Args:
        tol: of the residual; None: 1e-9, or 1e-5 in float32.
        max_steps: at most so many interior-point steps.
        newton_steps: at most so many Newton steps after them; 0 for programs with more than some thousand z, where
            their dense systems are too large.

    Raises:
        ValueError: if `tol`, `max_steps` or `newton_steps` is negative.
        ImportError: from `solve`, without Clarabel.
    """

    tol: float | None = None
    max_steps: int = 200
    newton_steps: int = 10

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, tol=BELOW_1, max_steps=AT_LEAST_0, newton_steps=AT_LEAST_0)

    @property
    def heeds(self) -> frozenset[Feature]:
        return frozenset({Feature.cones})

    @property
    def forgets_start(self) -> bool:
        return True

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        cones = objective.cones
        if cones is None:
            raise ValueError(
                "`Clarabel` solves cone programs, the inner problems of `from_cvxpy`. Got another objective. Use"
                " `QuadraticProgram`, or `LBFGS` where there are no constraints."
            )
        tol = (1e-9 if y0.dtype == torch.float64 else 1e-5) if self.tol is None else self.tol
        program = cones.program
        rows = [self._solve_row(program.row(k)) for k in range(len(program.c))]
        z, w = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
        point = ConePoint.of(program, z.to(program.c), w.to(program.c))
        solvable = torch.tensor([row[2] is None for row in rows], device=y0.device)
        point, error = (
            point.newton(self.newton_steps) if bool(solvable.any()) else (point, point.violation(point.faces))
        )
        error = torch.where(solvable, error, torch.nan)
        steps = [row[3] for row in rows]
        objective.tally.inner_steps += sum(steps)
        statuses = tuple(
            judged(e, tol, _LIMITS.get(row[4], Status.stagnated)) if row[2] is None else row[2]
            for row, e in zip(rows, error.tolist(), strict=True)
        )
        z = torch.where(solvable.unsqueeze(-1), point.z, torch.nan)
        shape = y0.shape[:-1]
        known = torch.cat([z, point.multipliers(point.faces)], -1).reshape(*shape, -1)
        return Solved(
            cones.recover(z).reshape(y0.shape).to(y0), statuses, error.reshape(shape).to(y0), max(steps), 0, known
        )

    @property
    def tolerance(self) -> float | None:
        return self.tol

    def with_tolerance(self, tol: float) -> Clarabel:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> Clarabel:
        return replace(self, max_steps=steps)

    def _solve_row(self, program: ConeProgram) -> tuple[Tensor, Tensor, Status | None, int, str]:
        """Z, w, a status where there is no solution, the steps taken, and what Clarabel calls its end."""
        clarabel, sparse = _packages()
        P, A = (
            sparse.csc_matrix(
                (each.values[0].cpu().numpy().astype(float), (each.i.cpu().numpy(), each.j.cpu().numpy())), each.shape
            )
            for each in (program.P, program.A)
        )
        settings = clarabel.DefaultSettings()
        settings.verbose = False
        settings.max_iter = self.max_steps
        settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-12
        settings.presolve_enable = settings.chordal_decomposition_enable = False
        c, b = (part[0].cpu().numpy().astype(float) for part in (program.c, program.b))
        nowhere = torch.full((len(c),), torch.nan), torch.full((len(b),), torch.nan)
        if not (torch.isfinite(program.c).all() and torch.isfinite(program.b).all()):
            return *nowhere, Status.nonfinite, 0, ""
        if not all(bool(each.values.isfinite().all()) for each in (program.P, program.A)):
            return *nowhere, Status.nonfinite, 0, ""
        cones, upper = [_cone(clarabel, cone) for cone in _each(program)], sparse.triu(P).tocsc()
        if not len(b):  # Clarabel wants a row: 0 z + s = 1, s >= 0
            A, b, cones = sparse.csc_matrix((1, len(c))), c[:1] * 0 + 1, [clarabel.NonnegativeConeT(1)]
        found = clarabel.DefaultSolver(upper, c, A, b, cones, settings).solve()
        ending, steps = str(found.status), int(found.iterations)
        if "PrimalInfeasible" in ending:
            return *nowhere, Status.infeasible, steps, ending
        if "DualInfeasible" in ending:
            return *nowhere, Status.unbounded, steps, ending
        z, w = (torch.as_tensor(part, dtype=torch.float64) for part in (found.x, found.z))
        return z, w[: len(program.b[0])], None, steps, ending


def _each(program: ConeProgram) -> list[Cone]:
    """The cones, those that Clarabel takes one by one as such."""
    found: list[Cone] = []
    for cone in program.cones:
        many = cone.kind in ("zero", "nonnegative")
        found += [cone] if many else [replace(cone, count=1)] * cone.count
    return found


def _cone(clarabel: Any, cone: Cone) -> Any:
    if cone.kind == "exponential":
        return clarabel.ExponentialConeT()
    types = {
        "zero": (clarabel.ZeroConeT, cone.count),
        "nonnegative": (clarabel.NonnegativeConeT, cone.count),
        "second-order": (clarabel.SecondOrderConeT, cone.order),
        "psd": (clarabel.PSDTriangleConeT, cone.order),
    }
    kind, size = types[cone.kind]
    return kind(size)


def _packages() -> tuple[Any, Any]:
    try:
        import clarabel  # pyright: ignore[reportMissingImports]
        from scipy import sparse
    except ImportError as error:
        raise ImportError('`Clarabel` needs clarabel and scipy: pip install "bilevel[convex]"') from error
    return clarabel, sparse
