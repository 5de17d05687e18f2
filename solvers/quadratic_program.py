"""Convex quadratic programs: a batched interior-point method with an exact end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._demand import demand_types
from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._polytope import FlatPolytope
from bilevel._result import Solved, Status
from bilevel._saddle import SaddlePoint, pseudo_inverse, restricted
from bilevel.solvers.mehrotra import Mehrotra, Point, Program, largest, times

_ENOUGH = 1e-10  # an error of the interior-point method that tells which bounds hold


@final
@dataclass(frozen=True)
class QuadraticProgram(AbstractInnerSolver):
    """argmin {y'Qy / 2 + q'y : A y = b, lower <= y <= upper}: interior-point steps, then the equations of the free set.

    Mehrotra's predictor-corrector method finds which bounds hold, in some 10 to 20 steps whatever the size. The
    optimality conditions with these bounds as equalities are then solved directly; where that lowers the error, which
    it does unless many bounds hold only just, y is exact to rounding, and held entries are on their bounds exactly.
    Q positive definite on the null space of A on the free entries gives a unique y.

    `Solved.residual` is the largest relative violation of the optimality conditions at the returned point, with the
    gradient of g itself: |grad g + A' multipliers| on the free entries, wrong signs of multipliers, |A y - b|, and
    distances of held entries from their bounds, relative to the largest entries of what cancels.

    Statuses: `infeasible` with a certificate (Farkas' lemma); `not_positive_definite` where Q is not;
    `stagnated` where rounding stops progress, or g is not quadratic.

    Cost: q Hessian products for Q, two gradients; a step factors q + m equations, q^3 / 3 flops. Memory q^2 a problem.
    Arithmetic is in float64, also for a float32 problem. Rows of a batch are independent.

    Source: Mehrotra, "On the implementation of a primal-dual interior point method", SIAM J. Optim. 2 (1992).

    Args:
        tol: of the error; None: 1e-10, or 1e-5 in float32.
        max_steps: at most so many interior-point steps.

    Raises:
        ValueError: if `tol` or `max_steps` is negative.

    Example:
        >>> from bilevel._polytope import Polytope
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

    def __post_init__(self) -> None:
        demand_types(self)
        for name in ("tol", "max_steps"):
            number = getattr(self, name)
            if number is not None and not number >= 0:
                raise ValueError(f"`QuadraticProgram({name}=...)` must be at least 0. Got {number}.")

    @property
    def heeds_constraints(self) -> bool:
        return True

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        tol = (1e-10 if y0.dtype == torch.float64 else 1e-5) if self.tol is None else self.tol
        program = program_of(objective, y0)
        found = solve_program(program, tol, self.max_steps)
        y = found.y.reshape(y0.shape).to(y0)
        gradient = objective.last_gradient(y).reshape(found.y.shape).to(found.y)
        error = violation(program, y.reshape(found.y.shape).to(found.y), found.multipliers, gradient)
        steps = int(found.steps.sum())
        objective.tally.inner_steps += steps
        statuses = tuple(
            _verdict(status, e, tol, most)
            for status, e, most in zip(
                found.statuses, error.tolist(), (found.steps >= self.max_steps).tolist(), strict=True
            )
        )
        held = int(((y.reshape(found.y.shape) >= program.upper) | (y.reshape(found.y.shape) <= program.lower)).sum())
        multipliers = found.multipliers.reshape(*y0.shape[:-1], -1).to(y0)
        return Solved(y, statuses, error.reshape(y0.shape[:-1]).to(y0), int(found.steps.max()), held, multipliers)


@final
@dataclass(frozen=True, eq=False)
class Found:
    """Solutions of a batch of programs: y, equality multipliers, a status where one is known already, steps."""

    y: Tensor
    multipliers: Tensor
    statuses: tuple[Status | None, ...]
    steps: Tensor


def program_of(objective: Objective, y0: Tensor) -> Program:
    """The quadratic g at y0 and its constraints, with one axis of rows, in float64; q Hessian products."""
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
    q = gradient.reshape(rows, n).to(dtype) - times(Q, y0.reshape(rows, n).to(dtype))
    return Program(Q, q, A, b, lower, upper)


def solve_program(program: Program, tol: float, max_steps: int) -> Found:
    """The solutions of a batch of programs."""
    inconsistent = _inconsistent(program)
    lost = ~torch.cat([part.flatten(1) for part in (program.Q, program.q, program.A, program.b)], -1).isfinite().all(-1)
    reduced, fixed = _without_fixed(_replaced(program, inconsistent | lost))
    method = Mehrotra(reduced)
    # Where products of slacks and multipliers are below tol^2, the lesser of each two is below tol.
    point, error, steps = method.run(min(tol, max(tol * tol, _ENOUGH)), max_steps)
    point, error = _polished(reduced, point, error)
    y = torch.where(fixed, program.lower, point.y.clamp(reduced.lower, reduced.upper))
    y = torch.where(lost.unsqueeze(-1), torch.nan, y)
    certified = _farkas(reduced, point) & (error > tol)
    indefinite = ~torch.linalg.cholesky_ex(_shifted(reduced))[1].eq(0)
    rows = zip(lost.tolist(), (inconsistent | certified).tolist(), indefinite.tolist(), strict=True)
    statuses = tuple(
        Status.nonfinite if a else Status.infeasible if b else Status.not_positive_definite if c else None
        for a, b, c in rows
    )
    return Found(y, point.multipliers, statuses, steps)


def violation(program: Program, y: Tensor, multipliers: Tensor, gradient: Tensor) -> Tensor:
    """The largest relative violation of the optimality conditions at y `(batch, q)`: `(batch,)`."""
    primal, dual = program.scales(y, multipliers)
    pull = (gradient + times(program.A.mT, multipliers)) / dual
    above, below = (program.upper - y) / primal, (y - program.lower) / primal
    outside = torch.maximum(-above, -below).clamp_min(0)
    # A positive pull is in order as far as y is on its lower bound, a negative one on its upper bound.
    unmatched = torch.where(pull > 0, torch.minimum(pull, below.clamp_min(0)), torch.minimum(-pull, above.clamp_min(0)))
    equality = (times(program.A, y) - program.b) / primal
    worst: Tensor = torch.cat([largest(part) for part in (outside, unmatched, equality)], -1).amax(-1)
    return worst


def _polished(program: Program, point: Point, error: Tensor) -> tuple[Point, Tensor]:
    """The solution with the bounds that seem to hold as equalities, in the rows where its error is less."""
    primal, dual = program.scales(point.y, point.multipliers)
    held = (point.z / dual.unsqueeze(-1) > point.slacks / primal.unsqueeze(-1)) & (point.z > 0)
    up, down = held.unbind(-2)
    bound = torch.where(up, program.upper, torch.where(down, program.lower, torch.zeros_like(point.y)))
    free = ~(up | down)
    M, A = restricted(program.Q, program.A, free)
    size = torch.diagonal(program.Q, dim1=-2, dim2=-1).abs().amax(-1)
    rest = program.gradient(bound)
    y, shift = SaddlePoint.factor(M, A, size).solve(
        -(rest + times(program.A.mT, point.multipliers)) * free, program.b - times(program.A, bound)
    )
    y, multipliers = torch.where(free, y, bound), point.multipliers + shift
    now = violation(program, y, multipliers, program.gradient(y))
    before = violation(program, point.y, point.multipliers, program.gradient(point.y))
    better = now < before  # false where NaN
    polished = Point(y, multipliers, point.slacks, point.z)
    return polished.where(better, point), torch.where(better, now, torch.maximum(error, before))


def _without_fixed(program: Program) -> tuple[Program, Tensor]:
    """The program in the entries that are not fixed by equal bounds; these are decoupled, and which they are."""
    fixed = program.lower >= program.upper
    value = torch.where(fixed, program.lower, torch.zeros_like(program.lower))
    Q, A = restricted(program.Q, program.A, ~fixed)
    q = torch.where(fixed, torch.zeros_like(program.q), program.gradient(value))
    lower = torch.where(fixed, -torch.inf, program.lower)
    upper = torch.where(fixed, torch.inf, program.upper)
    return Program(Q, q, A, program.b - times(program.A, value), lower, upper), fixed


def _replaced(program: Program, rows: Tensor) -> Program:
    """Trivial programs in these rows: factorizations of NaN raise or hang on some devices."""
    eye = torch.eye(program.q.shape[-1], dtype=program.q.dtype, device=program.q.device)
    row = rows.unsqueeze(-1)
    return Program(
        torch.where(rows[:, None, None], eye, program.Q),
        program.q.masked_fill(row, 0),
        program.A.masked_fill(rows[:, None, None], 0),
        program.b.masked_fill(row, 0),
        program.lower.masked_fill(row, -torch.inf),
        program.upper.masked_fill(row, torch.inf),
    )


def _inconsistent(program: Program) -> Tensor:
    """Whether bounds cross, or A y = b has no solution at all."""
    A = torch.where(program.A.isfinite(), program.A, torch.zeros_like(program.A))
    b = torch.where(program.b.isfinite(), program.b, torch.zeros_like(program.b))
    left = b - times(A @ A.mT, times(pseudo_inverse(A @ A.mT), b))
    return (program.lower > program.upper).any(-1) | (largest(left) > 1e-8 * largest(b)).squeeze(-1)


def _farkas(program: Program, point: Point) -> Tensor:
    """Whether the multipliers prove that no point satisfies the constraints.

    A'm + z_upper - z_lower = 0 with z >= 0 and b'm + upper'z_upper - lower'z_lower < 0 cannot be if one does.
    """
    up, down = point.z.unbind(-2)
    left = largest(times(program.A.mT, point.multipliers) + up - down).squeeze(-1)
    bounded = torch.where(program.upper.isfinite(), program.upper, 0) * up
    bounded = bounded - torch.where(program.lower.isfinite(), program.lower, 0) * down
    gap = -((program.b * point.multipliers).sum(-1) + bounded.sum(-1))
    size = torch.maximum(largest(program.b), largest(torch.where(bounded != 0, bounded / (up + down), 0))).squeeze(-1)
    return (gap > 0) & (left * size < 1e-6 * gap)


def _shifted(program: Program) -> Tensor:
    n = program.q.shape[-1]
    size = torch.diagonal(program.Q, dim1=-2, dim2=-1).abs().amax(-1)
    level = torch.where(size > 0, 1e-9 * size, torch.ones_like(size))
    return program.Q + level[:, None, None] * torch.eye(n, dtype=program.Q.dtype, device=program.Q.device)


def _verdict(status: Status | None, error: float, tol: float, exhausted: bool) -> Status:
    if status is not None:
        return status
    if not error < float("inf"):
        return Status.nonfinite
    if error <= tol:
        return Status.successful
    return Status.max_steps if exhausted else Status.stagnated
