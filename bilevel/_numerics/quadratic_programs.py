"""Batches of convex quadratic programs in tensors: presolve, interior-point steps, exact end, certificates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._numerics.interior_point import Mehrotra, Point, Program
from bilevel._numerics.principal_pivoting import pivoted
from bilevel._numerics.rows import matrix_times, positive_or_one, row_moduli
from bilevel._numerics.saddle_point import SaddlePoint, alone, pseudo_inverse, restricted
from bilevel._result import Status

# An error of the interior-point method that tells which bounds hold: the lesser of each slack and multiplier is then
# below 1e-5 of its scale. What is nearer to both being zero is decided by trying, further down.
_ENOUGH = 1e-10
# A violation that is rounding. What pivoting leaves more of is left to interior points and their exact end.
_EXACT = 1e-13


@final
@dataclass(frozen=True, eq=False)
class Found:
    """Solutions of a batch of programs: y, equality multipliers, a status where one is known already, steps."""

    y: Tensor
    multipliers: Tensor
    statuses: tuple[Status | None, ...]
    steps: Tensor


def solve_program(program: Program, tol: float, max_steps: int) -> Found:
    """The solutions of a batch of programs: by pivoting where that is exact, and by interior points elsewhere."""
    ahead = pivoted(program, max_steps)
    if ahead is None:
        return _by_interior_points(program, tol, max_steps)
    gradient = program.gradient(ahead.y)
    exact = ahead.done & (violation(program, ahead.y, ahead.multipliers, gradient) <= _EXACT)
    statuses: list[Status | None] = [None] * len(exact)
    if bool(exact.all()):
        return Found(ahead.y, ahead.multipliers, tuple(statuses), ahead.steps.clamp_max(max(max_steps - 1, 0)))
    left = (~exact).nonzero().squeeze(-1)
    others = _by_interior_points(program.chosen(left), tol, max_steps)
    y, multipliers, steps = ahead.y.clone(), ahead.multipliers.clone(), ahead.steps.clamp_max(max(max_steps - 1, 0))
    y[left], multipliers[left], steps[left] = others.y, others.multipliers, others.steps
    for place, status in zip(left.tolist(), others.statuses, strict=True):
        statuses[place] = status
    return Found(y, multipliers, tuple(statuses), steps)


def _by_interior_points(program: Program, tol: float, max_steps: int) -> Found:
    parts = (program.Q, program.q, program.A, program.b)
    lost = ~torch.cat([part.flatten(1) for part in parts], -1).isfinite().all(-1)
    lost = lost | program.lower.isnan().any(-1) | program.upper.isnan().any(-1)
    inconsistent = ~lost & _inconsistent(_replaced(program, lost))
    reduced, fixed = without_fixed(_replaced(program, inconsistent | lost))
    # Where products of slacks and multipliers are below tol^2, the lesser of each two is below tol.
    method = Mehrotra(reduced)
    inside, _, steps = method.run(min(tol, max(tol * tol, _ENOUGH)), max_steps)
    point, error = _polished(reduced, inside)
    if bool((error > tol).any()) and int(steps.max()) < max_steps:  # which bounds hold is seen further down only
        inside, _, more = method.run(0.0, max_steps - int(steps.max()), inside)
        final, now = _polished(reduced, inside)
        steps = steps + torch.where(error > tol, more, torch.zeros_like(more))
        point, error = final.where(now < error, point), torch.where(now < error, now, error)
    y = torch.where(fixed, program.lower, point.y.clamp(reduced.lower, reduced.upper))
    y = torch.where(lost.unsqueeze(-1), torch.nan, y)
    unsolved = ~(error <= tol)
    infeasible = inconsistent | (unsolved & _farkas(reduced, point))
    indefinite = _lacks_factor(reduced, 1e-9) | (unsolved & (steps < max_steps) & _lacks_factor(reduced, 0.0))
    statuses = tuple(
        Status.nonfinite if a else Status.infeasible if b else Status.not_positive_definite if c else None
        for a, b, c in zip(lost.tolist(), infeasible.tolist(), indefinite.tolist(), strict=True)
    )
    return Found(y, point.multipliers, statuses, steps)


def violation(
    program: Program, y: Tensor, multipliers: Tensor, gradient: Tensor, floor: Tensor | None = None
) -> Tensor:
    """The largest relative violation of the optimality conditions at y `(batch, q)`: `(batch,)`.

    Gradients are compared with `floor` `(batch, 1)` at least.
    """
    primal, dual = program.scales(y, multipliers)
    dual = dual if floor is None else torch.maximum(dual, floor)
    pull = (gradient + matrix_times(program.A.mT, multipliers)) / dual
    above, below = (program.upper - y) / primal, (y - program.lower) / primal
    outside = torch.maximum(-above, -below).clamp_min(0)
    # A positive pull is in order as far as y is on its lower bound, a negative one on its upper bound.
    unmatched = torch.where(pull > 0, torch.minimum(pull, below.clamp_min(0)), torch.minimum(-pull, above.clamp_min(0)))
    equality = (matrix_times(program.A, y) - program.b) / primal
    worst: Tensor = torch.cat([row_moduli(part) for part in (outside, unmatched, equality)], -1).amax(-1)
    return worst


def _polished(program: Program, point: Point) -> tuple[Point, Tensor]:
    """With the bounds that seem to hold as equalities, in the rows where that is better; and the violation."""
    found = polished(program, point)
    now = violation(program, found.y, found.multipliers, program.gradient(found.y))
    before = violation(program, point.y, point.multipliers, program.gradient(point.y))
    better = now < before  # false where NaN
    return found.where(better, point), torch.where(better, now, before)


def polished(program: Program, point: Point) -> Point:
    """The solution with the bounds that seem to hold, by their slacks and multipliers, as equalities."""
    primal, dual = program.scales(point.y, point.multipliers)
    held = (point.z / dual.unsqueeze(-1) > point.slacks / primal.unsqueeze(-1)) & (point.z > 0)
    up, down = held.unbind(-2)
    bound = torch.where(up, program.upper, torch.where(down, program.lower, torch.zeros_like(point.y)))
    free = ~(up | down)
    M, A = restricted(program.Q, program.A, free)
    size = positive_or_one(torch.diagonal(program.Q, dim1=-2, dim2=-1).abs().amax(-1))  # 1 in linear programs
    rest = program.gradient(bound)
    y, shift = SaddlePoint.factor(M, A, size).solve(
        -(rest + matrix_times(program.A.mT, point.multipliers)) * free, program.b - matrix_times(program.A, bound)
    )
    y, multipliers = torch.where(free, y, bound), point.multipliers + shift
    only = alone(program.A, free)  # an entry that an equality determines by itself has its value exactly
    values = torch.where(only, (program.b - matrix_times(program.A, bound)).unsqueeze(-1) / program.A, 0)
    y = torch.where(only.any(-2), values.sum(-2) / only.sum(-2).clamp_min(1), y)
    return Point(y, multipliers, point.slacks, point.z)


def without_fixed(program: Program) -> tuple[Program, Tensor]:
    """The program in the entries that are not fixed by equal bounds; these are decoupled, and which they are."""
    fixed = program.lower >= program.upper
    value = torch.where(fixed, program.lower, torch.zeros_like(program.lower))
    Q, A = restricted(program.Q, program.A, ~fixed)
    q = torch.where(fixed, torch.zeros_like(program.q), program.gradient(value))
    lower = torch.where(fixed, -torch.inf, program.lower)
    upper = torch.where(fixed, torch.inf, program.upper)
    return Program(Q, q, A, program.b - matrix_times(program.A, value), lower, upper), fixed


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
    """Whether bounds cross, or A y = b has no solution at all with the entries that are fixed."""
    reduced, fixed = without_fixed(program)
    known = torch.where(fixed, program.lower, torch.zeros_like(program.lower))
    size = torch.maximum(row_moduli(program.b), row_moduli(matrix_times(program.A.abs(), known.abs())))
    S = reduced.A @ reduced.A.mT
    left = reduced.b - matrix_times(S, matrix_times(pseudo_inverse(S), reduced.b))
    return (program.lower > program.upper).any(-1) | (row_moduli(left) > 1e-8 * size).squeeze(-1)


def _farkas(program: Program, point: Point) -> Tensor:
    """Whether the multipliers prove that no point satisfies the constraints.

    A'm + z_upper - z_lower = 0 with z >= 0 and b'm + upper'z_upper - lower'z_lower < 0 cannot be if one does. The z are
    those that m leaves: those of the iterate may be far from it where a step came to an end.
    """
    pull = matrix_times(program.A.mT, point.multipliers)
    up = torch.where(program.upper.isfinite(), (-pull).clamp_min(0), 0.0)
    down = torch.where(program.lower.isfinite(), pull.clamp_min(0), 0.0)
    left = row_moduli(pull + up - down).squeeze(-1)
    bounded = torch.where(program.upper.isfinite(), program.upper, 0) * up
    bounded = bounded - torch.where(program.lower.isfinite(), program.lower, 0) * down
    gap = -((program.b * point.multipliers).sum(-1) + bounded.sum(-1))
    size = torch.maximum(
        row_moduli(program.b), row_moduli(torch.where(bounded != 0, bounded / (up + down), 0))
    ).squeeze(-1)
    return left * size < 1e-6 * gap


def _lacks_factor(program: Program, shift: float) -> Tensor:
    """Whether Q plus a multiple of its largest entry has no Cholesky factor, on the null space of A."""
    size = torch.diagonal(program.Q, dim1=-2, dim2=-1).abs().amax(-1)
    eye = torch.eye(program.q.shape[-1], dtype=program.q.dtype, device=program.q.device)
    level = torch.where(size > 0, shift * size, torch.full_like(size, shift))
    return ~SaddlePoint.factor(program.Q + level[:, None, None] * eye, program.A, size).definite
