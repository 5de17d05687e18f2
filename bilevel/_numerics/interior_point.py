"""Mehrotra's predictor-corrector method for a batch of convex quadratic programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._numerics.rows import matrix_times, positive_or_one, row_moduli
from bilevel._numerics.saddle_point import SaddlePoint

# How far towards the nearest boundary a step goes: short of it, as slacks and multipliers must stay positive, and near
# enough for each step to reduce their products two hundredfold at the end.
BACK = 0.995
# Iterations without progress after which a row is given up. The whole iteration takes some 10 to 20, and an error may
# rise for a few of them while the iterates turn towards the central path.
_IDLE = 8


@final
@dataclass(frozen=True, eq=False)
class Program:
    """Min y'Qy / 2 + q'y  s.t.  A y = b, lower <= y <= upper: Q `(batch, q, q)`, A `(batch, m, q)`, vectors alike.

    The last `slacks` entries are slacks of the last rows of A, each of one and of nothing else.
    """

    Q: Tensor
    q: Tensor
    A: Tensor
    b: Tensor
    lower: Tensor
    upper: Tensor
    slacks: int = 0

    def chosen(self, rows: Tensor) -> Program:
        """Some of the programs."""
        Q, q, A, b, lower, upper = (part[rows] for part in (self.Q, self.q, self.A, self.b, self.lower, self.upper))
        return Program(Q, q, A, b, lower, upper, self.slacks)

    def with_slacks(self, y: Tensor) -> Tensor:
        """The first entries of a point completed by those that the last equalities leave: `(batch, q)`."""
        k = self.q.shape[-1] - y.shape[-1]
        if not k:
            return y
        return torch.cat([y, self.b[:, -k:] - matrix_times(self.A[:, -k:, :-k], y)], -1)

    def gradient(self, y: Tensor) -> Tensor:
        """Q y + q."""
        return matrix_times(self.Q, y) + self.q

    def scales(self, y: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor]:
        """The sizes that errors in y and in the gradient are relative to: `(batch, 1)` each, never zero."""
        bounds = torch.stack([self.lower, self.upper], -2)
        bounds = torch.where(bounds.isfinite(), bounds, torch.zeros_like(bounds))
        primal = torch.maximum(row_moduli(bounds.flatten(1)), row_moduli(y))
        pull = row_moduli(matrix_times(self.A.mT, multipliers))
        dual = torch.maximum(torch.maximum(row_moduli(self.q), row_moduli(matrix_times(self.Q, y))), pull)
        return positive_or_one(primal), positive_or_one(dual)


@final
@dataclass(frozen=True, eq=False)
class Point:
    """A primal-dual point: y, equality multipliers, and slacks and multipliers of upper and lower bounds.

    Attributes:
        y: `(batch, q)`.
        multipliers: `(batch, m)`; Q y + q + A' multipliers + z_upper - z_lower = 0 at the solution.
        slacks: of the upper and of the lower bounds: `(batch, 2, q)`, ones where there is no bound.
        z: their multipliers, zeros where there is no bound.
    """

    y: Tensor
    multipliers: Tensor
    slacks: Tensor
    z: Tensor

    def where(self, chosen: Tensor, other: Point) -> Point:
        """This point in the chosen rows, the other in the rest."""
        row, plane = chosen.unsqueeze(-1), chosen[:, None, None]
        return Point(
            torch.where(row, self.y, other.y),
            torch.where(row, self.multipliers, other.multipliers),
            torch.where(plane, self.slacks, other.slacks),
            torch.where(plane, self.z, other.z),
        )

    def moved(self, step: Point, length: Tensor) -> Point:
        """The point after a step of this length `(batch,)`."""
        row, plane = length.unsqueeze(-1), length[:, None, None]
        return Point(
            self.y + row * step.y,
            self.multipliers + row * step.multipliers,
            self.slacks + plane * step.slacks,
            self.z + plane * step.z,
        )


@final
class Mehrotra:
    """The iteration; each row of the batch with its own step length, centering and end.

    A step factors Q plus a diagonal once and solves twice with it: affine direction, then the corrected one with
    centering (mu_affine / mu)^3. Infeasible start; an error is the largest relative violation of the optimality
    conditions, with s'z in place of complementarity.

    Source: Mehrotra, "On the implementation of a primal-dual interior point method", SIAM J. Optim. 2 (1992);
    Nocedal, Wright, "Numerical optimization" (2006), section 16.6.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.sign = program.q.new_tensor([[1.0], [-1.0]])
        self.limits = torch.stack([program.upper, -program.lower], -2)
        self.bounded = self.limits.isfinite()
        self.limits = torch.where(self.bounded, self.limits, torch.zeros_like(self.limits))
        self.count = self.bounded.sum((-2, -1)).clamp_min(1)
        self.size = positive_or_one(torch.diagonal(program.Q, dim1=-2, dim2=-1).abs().amax(-1, keepdim=True)).squeeze(
            -1
        )

    def run(self, tol: float, max_steps: int, start: Point | None = None) -> tuple[Point, Tensor, Tensor]:
        """The best point met from a start, its error and the steps taken: `(batch,)` each."""
        point = self.start() if start is None else start
        best, error, idle = point, self.error(point), torch.zeros_like(self.count)
        steps = torch.zeros_like(self.count)
        for _ in range(max_steps):
            moving = (error > tol) & (idle < _IDLE)
            if not bool(moving.any()):
                break
            point = self.step(point).where(moving, point)
            steps += moving
            now = self.error(point)
            better = moving & (now < error)
            best, error = point.where(better, best), torch.where(better, now, error)
            idle = torch.where(better, torch.zeros_like(idle), idle + moving)
        return best, error, steps

    def start(self) -> Point:
        """The minimizer with the bounds as penalties of the size of Q, pushed inside."""
        p = self.program
        weight = self.size[:, None, None] * self.bounded
        saddle = self.factor(weight.sum(-2))
        y, multipliers = saddle.solve(-p.q + (weight * self.sign * self.limits).sum(-2), p.b)
        slacks = self.limits - self.sign * y.unsqueeze(-2)
        z = self.masked(-self.size[:, None, None] * slacks)
        slacks, z = self._pushed(slacks), self._pushed(z)
        product = (slacks * z).sum((-2, -1), keepdim=True)
        shift_s, shift_z = (0.5 * product / positive_or_one(other.sum((-2, -1), keepdim=True)) for other in (z, slacks))
        slacks, z = slacks + shift_s, z + shift_z
        return Point(
            y, multipliers, torch.where(self.bounded, positive_or_one(slacks), 1.0), self.masked(positive_or_one(z))
        )

    def step(self, at: Point) -> Point:
        """One predictor-corrector step."""
        saddle = self.factor((at.z / at.slacks).sum(-2))
        mu = (at.slacks * at.z).sum((-2, -1)) / self.count
        affine = self.direction(saddle, at, at.slacks * at.z)
        ahead = at.moved(affine, longest(at, affine))
        reached = (ahead.slacks * ahead.z * self.bounded).sum((-2, -1)) / self.count
        centering = (reached / positive_or_one(mu)).clamp(0, 1) ** 3
        target = at.slacks * at.z + affine.slacks * affine.z - self.masked((centering * mu)[:, None, None])
        step = self.direction(saddle, at, target)
        return at.moved(step, (BACK * longest(at, step)).clamp_max(1.0))

    def error(self, at: Point) -> Tensor:
        """The largest relative violation of the optimality conditions."""
        p = self.program
        primal, dual = p.scales(at.y, at.multipliers)
        stationarity, equality, slack = self.residuals(at)
        complementarity = (at.slacks * at.z).flatten(1) / (primal * dual)
        parts = (stationarity / dual, equality / primal, slack.flatten(1) / primal, complementarity)
        worst = torch.cat([row_moduli(part) for part in parts], -1).amax(-1)
        return torch.where(worst.isfinite(), worst, torch.inf)

    def residuals(self, at: Point) -> tuple[Tensor, Tensor, Tensor]:
        """Of stationarity, of the equalities, and of the bounds with their slacks."""
        p = self.program
        stationarity = p.gradient(at.y) + matrix_times(p.A.mT, at.multipliers) + (self.sign * at.z).sum(-2)
        slack = self.masked(self.sign * at.y.unsqueeze(-2) + at.slacks - self.limits)
        return stationarity, matrix_times(p.A, at.y) - p.b, slack

    def direction(self, saddle: SaddlePoint, at: Point, target: Tensor) -> Point:
        """The Newton step to zero residuals and slacks * z reduced by `target`."""
        stationarity, equality, slack = self.residuals(at)
        pull = (self.sign * self.masked((at.z * slack - target) / at.slacks)).sum(-2)
        y, multipliers = saddle.solve(-stationarity - pull, -equality)
        slacks = self.masked(-slack - self.sign * y.unsqueeze(-2))
        return Point(y, multipliers, slacks, self.masked(-(target + at.z * slacks) / at.slacks))

    def factor(self, diagonal: Tensor) -> SaddlePoint:
        """The factors of the system of a step."""
        return SaddlePoint.factor(self.program.Q + torch.diag_embed(diagonal), self.program.A, self.size)

    def masked(self, entries: Tensor) -> Tensor:
        """The entries where there are bounds, and zeros elsewhere."""
        return torch.where(self.bounded, entries, torch.zeros_like(entries))

    def _pushed(self, entries: Tensor) -> Tensor:
        inside = torch.where(self.bounded, entries, torch.inf).flatten(1).amin(-1)[:, None, None]
        shift = (-1.5 * inside).clamp_min(0)
        return self.masked(entries + torch.where(shift.isfinite(), shift, torch.zeros_like(shift)))


def longest(at: Point, step: Point) -> Tensor:
    """The longest step `(batch,)` up to 1 / 0.995 that keeps slacks and multipliers nonnegative."""
    here, change = torch.cat([at.slacks, at.z], -1).flatten(1), torch.cat([step.slacks, step.z], -1).flatten(1)
    ratios = torch.where(change < 0, -here / change, torch.inf)
    return ratios.amin(-1).clamp_max(1 / BACK)
