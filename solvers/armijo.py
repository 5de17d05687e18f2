"""Backtracking to a sufficient decrease."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, final

import torch
from torch import Tensor

from bilevel._inner import Objective
from bilevel._numerics.rows import row_dots
from bilevel._result import Solved, Status
from bilevel._validate import demand_types
from bilevel.arguments.ranges import POSITIVE, demand_ranges

# In rounding units of the objective: differences of values below are not believed. The rounding of a sum of n terms of
# one sign is some sqrt(n) units, so that a hundred is enough for ten thousand terms.
NOISE = 100.0
# Steps without the least progress of value or gradient before the rounding floor is declared. Above it values decrease
# at every step of a line search; what looks like none is rounding, and may still be followed by progress.
_PATIENCE = 100


@final
@dataclass(frozen=True)
class Armijo:
    """t = initial shrink^j with the least j for which g(y + t d) <= g(y) + slope t d' grad g(y).

    Exists for every smooth objective and descent direction d. The next step starts from the last t times `growth`.
    Where the decrease to be expected is below the rounding of the values, the condition is tested by gradients, as
    d' grad g(y + t d) <= (2 slope - 1) d' grad g(y), which on quadratics is the same.

    Cost: one value a trial; a gradient a trial at the rounding floor. Rows of a batch have a t each.

    Source: Armijo, "Minimization of functions having Lipschitz continuous first partial derivatives", Pacific J.
    Math. 16 (1966); for the rounding floor Hager, Zhang, "A new conjugate gradient method with guaranteed descent
    and an efficient line search", SIAM J. Optim. 16 (2005).

    Args:
        initial: the first t to try.
        shrink: by what it is multiplied until the condition holds, in (0, 1).
        slope: the share of the decrease along the tangent that is asked for, in (0, 1/2).
        max_halvings: give up after so many shrinkings.
        growth: by what the last t is multiplied for the first trial of the next step, at least 1.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> from bilevel.solvers import GradientDescent, Iterate
        >>> objective = Objective(lambda y: 50 * (y - 1).square().sum())
        >>> solver = Iterate(GradientDescent(), max_steps=100, tol=1e-6, line_search=Armijo())
        >>> solver.solve(objective, torch.zeros(1, dtype=torch.float64)).status.name
        'successful'
    """

    initial: float = 1.0
    shrink: float = 0.5
    slope: float = 1e-4
    max_halvings: int = 30
    growth: float = 2.0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, initial=POSITIVE)
        if not 0 < self.shrink < 1:
            raise ValueError(f"`Armijo(shrink=...)` must be in (0, 1). Got {self.shrink}.")
        if not 0 < self.slope < 0.5:
            raise ValueError(f"`Armijo(slope=...)` must be in (0, 1/2). Got {self.slope}.")
        if self.max_halvings < 0:
            raise ValueError(f"`Armijo(max_halvings=...)` must be at least 0. Got {self.max_halvings}.")
        if not 1 <= self.growth < math.inf:
            raise ValueError(f"`Armijo(growth=...)` must be at least 1. Got {self.growth}.")

    def search(self, objective: Objective, at: Along, t: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """A t for each active row, `(*batch,)`, and which rows have found one; t is 0 in all others."""
        noise = rounding(at.value)
        d = torch.where(active.unsqueeze(-1), at.d, torch.zeros_like(at.d))
        t = torch.where(active, t, torch.zeros_like(t))
        pending = active
        for _ in range(self.max_halvings + 1):
            trial = torch.addcmul(at.y, t.unsqueeze(-1), d)
            fine = t * -at.slope <= noise  # the decrease to be expected is lost in the rounding of the values
            if bool((pending & fine).any()):
                value, gradient = objective.value_and_gradient(trial)
                level = (value <= at.value + noise) & (row_dots(gradient, d) <= (2 * self.slope - 1) * at.slope)
            else:
                value, level = objective.value(trial), torch.zeros_like(pending)
            found = (value <= at.value + self.slope * t * at.slope) & ~fine | fine & level
            pending = pending & ~found
            if not pending.any():
                break
            t = torch.where(pending, self.shrink * t, t)
        return torch.where(pending, torch.zeros_like(t), t), active & ~pending


class Along(NamedTuple):
    """A point y, the value there, a direction d and the slope d' grad g(y) along it, for each row."""

    y: Tensor
    value: Tensor
    d: Tensor
    slope: Tensor


def rounding(value: Tensor) -> Tensor:
    """What differences of the objective are not believed at this value of it."""
    return NOISE * torch.finfo(value.dtype).eps * value.abs()


def rescaled(
    solve: Callable[[Objective, float], Solved], objective: Objective, gradient: Tensor, tol: float
) -> Solved | None:
    """What a line search solver finds for a multiple of g whose gradient is of norm about 1; None: g will do itself.

    Products of two gradients, and of three in an interpolation, would under- or overflow. The multiple is a power of
    two, so that nothing is rounded; the residual is that of g.

    Args:
        solve: (objective, tolerance) -> solution.
        objective: g.
        gradient: that of g at the start `(*batch, q)`.
        tol: the tolerance for g.
    """
    largest = float(gradient.abs().amax()) if gradient.numel() else 1.0
    info = torch.finfo(gradient.dtype)
    if not 0 < largest < math.inf or info.tiny**0.25 < largest < info.max**0.25:
        return None
    exponent = -math.frexp(largest)[1]
    # What is brought up from below is no larger than this, and its inverse must be a number as well.
    exponent = max(min(exponent, -math.frexp(info.tiny)[1]), math.frexp(info.tiny)[1])
    factor = math.ldexp(1.0, exponent)
    solved = solve(objective.scaled(factor), factor * tol)
    return replace(solved, residual=solved.residual / factor)


def descend(
    search: Armijo, scale: float | Tensor, objective: Objective, y0: Tensor, max_steps: int, tol: float
) -> Solved:
    """Gradient descent y <- y - t scale grad g(y), t by Armijo's rule, a t for each row."""
    y = y0.detach().clone()
    value, gradient = objective.value_and_gradient(y)

    def solve(multiple: Objective, tol: float) -> Solved:
        return descend(search, scale, multiple, y, max_steps, tol)

    if (again := rescaled(solve, objective, gradient, tol)) is not None:
        return again
    lead = value.shape
    t = torch.full(lead, search.initial, dtype=y.dtype, device=y.device)
    progress = Idleness(value)
    status: list[Status | None] = [None] * lead.numel()
    steps = 0
    while True:
        norm = torch.linalg.vector_norm(gradient, dim=-1)
        progress.see(value, norm)
        status = ends(status, value, norm, progress.idle, tol)
        active = torch.tensor([s is None for s in status], device=y.device).reshape(lead)
        if steps == max_steps or not active.any():
            break
        d = -scale * gradient
        at = Along(y, value, d, row_dots(gradient, d))
        tried, found = search.search(objective, at, t, active)
        status = stops(status, active & ~found, at, t)
        if not found.any():
            continue
        y = torch.where(found.unsqueeze(-1), torch.addcmul(y, tried.unsqueeze(-1), d), y)
        t = torch.where(found, search.growth * tried, t)
        objective.tally.inner_steps += int(found.sum())
        steps += 1
        value, gradient = objective.value_and_gradient(y)
    return Solved(y, final_statuses(status, tol), norm, steps)


@final
class Idleness:
    """How many steps each row has gone without its least value or gradient so far."""

    def __init__(self, value: Tensor) -> None:
        self.value = self.norm = torch.full_like(value, torch.inf)
        self.idle = torch.zeros_like(value)

    def see(self, value: Tensor, norm: Tensor) -> None:
        """Take note of where the rows are now."""
        better = (value < self.value - torch.finfo(value.dtype).eps * self.value.abs()) | (norm < self.norm)
        better |= self.value.isinf()
        self.idle = torch.where(better, torch.zeros_like(self.idle), self.idle + 1)
        self.value, self.norm = torch.minimum(self.value, value), torch.minimum(self.norm, norm)


def ends(status: list[Status | None], value: Tensor, norm: Tensor, idle: Tensor, tol: float) -> list[Status | None]:
    """Which rows stop where they are, and why."""
    rows = torch.stack((value, norm, idle), dim=-1).reshape(-1, 3).tolist()
    return [before or end(v, n, i, tol) for before, (v, n, i) in zip(status, rows, strict=True)]


def final_statuses(status: list[Status | None], tol: float) -> tuple[Status, ...]:
    """The statuses at the end: without a tolerance, steps that ran out and the rounding floor are success."""
    if not tol:
        return tuple(Status.successful if s is None or s is Status.stagnated else s for s in status)
    return tuple(Status.max_steps if s is None else s for s in status)


def end(value: float, norm: float, idle: float, tol: float) -> Status | None:
    """Whether a row stops where it is, and why."""
    if not (math.isfinite(value) and math.isfinite(norm)):
        return Status.nonfinite
    if norm <= tol:
        return Status.successful
    if idle >= _PATIENCE:
        return Status.stagnated
    return None


def stops(status: list[Status | None], failed: Tensor, at: Along, t: Tensor) -> list[Status | None]:
    """Why no step length was found in the rows that failed: none exists, or rounding hides it."""
    hidden = (t * -at.slope <= rounding(at.value)).reshape(-1).tolist()
    return [
        (Status.stagnated if floor else Status.line_search_failed) if now else before
        for before, now, floor in zip(status, failed.reshape(-1).tolist(), hidden, strict=True)
    ]
