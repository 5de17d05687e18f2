"""A primal-dual interior-point method for batches of convex programs that are no quadratic ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._numerics.interior_point import BACK, Mehrotra, Point, Program, longest
from bilevel._numerics.quadratic_programs import polished, violation
from bilevel._numerics.rows import matrix_times, positive_or_one, row_moduli
from bilevel._numerics.saddle_point import SaddlePoint

_HALVINGS = 30  # of a step: 1e-9 of it is none
_IDLE = 15  # steps without a tenth less error
# Shifts of the matrix of a step, relative to its size: where it is not definite, where no step was found, and the most.
_LEAST, _FIRST, _MOST = 1e-10, 1e-4, 1e6
_SHIFTS = 18
_LESS = 0.9
_DESCENT = 1e-3  # of the residual, relative to the step, that is asked for
_POLISHES, _EXACT = 10, 1e-14
_FLOOR = 1e-12  # of the gradient at the start
_MADE = 1e3  # a start that is made may have so much larger an error: its slacks and multipliers are in proportion


@final
@dataclass(frozen=True, eq=False)
class Model:
    """A program at a point: its quadratic model, and the constraints themselves.

    Attributes:
        program: the Lagrangian to second order and the tangents of constraints, in entries of y and slacks.
        gradient: of g, with zeros for slacks: `(batch, n)`.
    """

    program: Program
    gradient: Tensor


@final
@dataclass(frozen=True, eq=False)
class NonlinearProgram:
    """Min g(y)  s.t.  E(y) = 0, lower <= y <= upper, where y has slacks of inequalities among its entries.

    Attributes:
        model: (y, multipliers) -> the program to second order.
        residuals: (y, multipliers) -> grad g + (dE/dy)' multipliers, and E; NaN where they are not defined.
        slacks: how many of the last entries are slacks, those of the last equations.
    """

    model: Callable[[Tensor, Tensor], Model]
    residuals: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    slacks: int


def run(
    problem: NonlinearProgram, point: Point, tol: float, max_steps: int, floor: Tensor
) -> tuple[Point, Tensor, Tensor, Tensor]:
    """The best point met from a start, its error, the steps taken and where the line search ended it: `(batch,)` each.

    A step is Mehrotra's for the program at the point, its length such that the residuals of the optimality conditions
    shrink; where they do not, the plain Newton step is tried, towards the same point of the central path.

    Source: Boyd, Vandenberghe, "Convex optimization" (2004), section 11.7; the predictor is Mehrotra's.

    Args:
        problem: the program.
        point: where to start.
        tol: of the error: the largest relative violation of the optimality conditions.
        max_steps: at most so many steps.
        floor: sizes that errors in the gradient are relative to at least: `(batch, 1)`.
    """
    rows = point.y.shape[0]
    best, error = point, point.y.new_full((rows,), torch.inf)
    idle, steps = torch.zeros(rows, dtype=torch.long, device=point.y.device), torch.zeros_like(error).long()
    stuck, shift = torch.zeros(rows, dtype=torch.bool, device=point.y.device), torch.zeros_like(error)
    for count in range(max_steps + 1):
        program = problem.model(point.y, point.multipliers).program
        method = Mehrotra(program)
        now = _error(method, point, floor)
        idle = torch.where(now < _LESS * error, torch.zeros_like(idle), idle + 1)
        better = now < error
        best, error = _either(point, better, best), torch.where(better, now, error)
        moving = (error > tol) & (idle < _IDLE) & ~stuck
        if count == max_steps or not bool(moving.any()):
            break
        ahead, failed, shift = _stepped(problem, method, point, floor, shift)
        point = _either(ahead, moving & ~failed, point)
        stuck = stuck | (moving & failed & (shift > _MOST))
        shift = torch.where(failed, (100 * shift).clamp_min(_FIRST), torch.where(shift > _LEAST, shift / 10, 0.0))
        steps += moving
    return best, error, steps, stuck


def _stepped(
    problem: NonlinearProgram, method: Mehrotra, at: Point, floor: Tensor, shift: Tensor
) -> tuple[Point, Tensor, Tensor]:
    """The point after a step, in which rows there is none, and the shift of Q, relative to its size, that was taken."""
    p = method.program
    saddle, Q, shift = _regularized(p, (at.z / at.slacks).sum(-2), shift)
    shifted = replace(p, Q=Q, q=p.gradient(at.y) - matrix_times(Q, at.y))  # the gradient at the point stays
    method = Mehrotra(shifted)
    product = method.masked(at.slacks * at.z)
    mu = product.sum((-2, -1)) / method.count
    affine = method.direction(saddle, at, product)
    ahead = at.moved(affine, longest(at, affine))
    reached = (ahead.slacks * ahead.z * method.bounded).sum((-2, -1)) / method.count
    centering = (reached / positive_or_one(mu)).clamp(0, 1) ** 3
    aim = method.masked((centering * mu)[:, None, None].expand_as(product))
    corrected = method.direction(saddle, at, product + method.masked(affine.slacks * affine.z) - aim)
    primal, dual = _scales(p, at, floor)

    def merit(there: Point, program: Program | None) -> Tensor:
        if program is None:
            stationarity, equality = problem.residuals(there.y, there.multipliers)
        else:
            stationarity = program.gradient(there.y) + matrix_times(program.A.mT, there.multipliers)
            equality = matrix_times(program.A, there.y) - program.b
        stationarity = stationarity + (method.sign * there.z).sum(-2)
        slack = method.residuals(there)[2]
        left = (method.masked(there.slacks * there.z) - aim).flatten(1) / (primal * dual)
        parts = (stationarity / dual, equality / primal, slack.flatten(1) / primal, left)
        size: Tensor = torch.linalg.vector_norm(torch.cat(parts, -1), dim=-1)
        return torch.where(size.isfinite(), size, torch.inf)

    before = merit(at, p)
    found, open_ = _searched(problem, merit, before, at, corrected, torch.ones_like(mu, dtype=torch.bool), 4)
    if bool(open_.any()):
        plain = method.direction(saddle, at, product - aim)
        tried = open_
        other, open_ = _searched(problem, merit, before, at, plain, open_, _HALVINGS)
        found = _either(other, tried & ~open_, found)
    return found, open_, shift


def _either(one: Point, chosen: Tensor, other: Point) -> Point:
    """One point in the chosen rows, the other in the rest; the very same where all rows are alike: models are kept."""
    return one if bool(chosen.all()) else one.where(chosen, other) if bool(chosen.any()) else other


def _searched(
    problem: NonlinearProgram,
    merit: Callable[[Point, Program | None], Tensor],
    before: Tensor,
    at: Point,
    step: Point,
    wanted: Tensor,
    halvings: int,
) -> tuple[Point, Tensor]:
    """The first point along a step, halved and halved, where the merit is less; the rows where there was none."""
    length = (BACK * longest(at, step)).clamp_max(1.0)
    finite = torch.cat([step.y, step.multipliers, step.slacks.flatten(1), step.z.flatten(1)], -1).isfinite().all(-1)
    found, open_ = at, wanted & finite
    for k in range(halvings):
        if not bool(open_.any()):
            break
        ahead = at.moved(step, length)
        # The first try is mostly taken, and its model needed next.
        program = problem.model(ahead.y, ahead.multipliers).program if k == 0 and bool(open_.all()) else None
        good = open_ & (merit(ahead, program) <= (1 - _DESCENT * length) * before)
        found, open_ = _either(ahead, good, found), open_ & ~good
        length = length / 2
    return found, open_ | (wanted & ~finite)


def _regularized(program: Program, diagonal: Tensor, shift: Tensor) -> tuple[SaddlePoint, Tensor, Tensor]:
    """The factors of a step, of Q plus as little of the identity as makes it definite where it has to be; Q, and that.

    Args:
        program: the program.
        diagonal: what bounds add to Q.
        shift: what to begin with, relative to the size of Q: `(batch,)`.
    """
    eye = torch.eye(diagonal.shape[-1], dtype=diagonal.dtype, device=diagonal.device)
    size = positive_or_one(torch.diagonal(program.Q, dim1=-2, dim2=-1).abs().amax(-1))
    count = 0
    while True:
        Q = program.Q + (shift * size)[:, None, None] * eye
        M = Q + torch.diag_embed(diagonal)
        M = torch.where(M.isfinite().all(-1).all(-1)[:, None, None], M, eye)
        saddle = SaddlePoint.factor(M, program.A, positive_or_one(torch.diagonal(M, dim1=-2, dim2=-1).amax(-1)))
        count += 1
        if bool(saddle.definite.all()) or count == _SHIFTS:
            return saddle, Q, shift
        shift = torch.where(saddle.definite, shift, (10 * shift).clamp_min(_LEAST))


def _scales(program: Program, at: Point, floor: Tensor) -> tuple[Tensor, Tensor]:
    primal, dual = program.scales(at.y, at.multipliers)
    return primal, torch.maximum(dual, floor)


def _error(method: Mehrotra, at: Point, floor: Tensor) -> Tensor:
    """The largest relative violation of the optimality conditions."""
    primal, dual = _scales(method.program, at, floor)
    stationarity, equality, slack = method.residuals(at)
    complementarity = method.masked(at.slacks * at.z).flatten(1) / (primal * dual)
    parts = (stationarity / dual, equality / primal, slack.flatten(1) / primal, complementarity)
    worst = torch.cat([row_moduli(part) for part in parts], -1).amax(-1)
    return torch.where(worst.isfinite(), worst, torch.inf)


def start(problem: NonlinearProgram, y: Tensor, multipliers: Tensor) -> tuple[Point, Tensor]:
    """Where to start, and sizes `(batch, 1)` that errors in the gradient are relative to at least.

    The solution of the quadratic model at y with bounds as penalties, pushed inside, or y itself, where that is better.
    """
    program = problem.model(y, multipliers).program
    method = Mehrotra(program)
    primal, dual = program.scales(y, multipliers)
    floor = _FLOOR * dual
    slacks = method.limits - method.sign * y.unsqueeze(-2)
    slacks = torch.where(method.bounded, torch.maximum(slacks, 0.1 * primal.unsqueeze(-1)), 1.0)
    z = method.masked((0.1 * primal * dual).unsqueeze(-1) / slacks)
    k = multipliers.shape[-1] - problem.slacks
    own = Point(y, torch.cat([multipliers[:, :k], z[:, 1, z.shape[-1] - problem.slacks :]], -1), slacks, z)
    made = method.start()
    there = problem.model(made.y, made.multipliers).program
    error, other = _error(method, own, floor), _error(Mehrotra(there), made, floor)
    return _either(made, other <= _MADE * error, own), floor


def newton(problem: NonlinearProgram, point: Point, floor: Tensor) -> tuple[Point, Tensor]:
    """Newton's method with the bounds that seem to hold as equalities; the best point met, and its violation."""
    model = problem.model(point.y, point.multipliers)
    best, error = point, violation(model.program, point.y, point.multipliers, model.gradient, floor)
    error = torch.where(error.isfinite(), error, torch.inf)
    for _ in range(_POLISHES):
        candidate = polished(model.program, point)
        there = problem.model(candidate.y, candidate.multipliers)
        now = violation(there.program, candidate.y, candidate.multipliers, there.gradient, floor)
        better = now < error  # false where NaN
        if not bool(better.any()):
            break
        best, error = _either(candidate, better, best), torch.where(better, now, error)
        if bool((error <= _EXACT).all()):
            break
        point = _either(candidate, now.isfinite(), point)
        model = problem.model(point.y, point.multipliers)
    return best, error
