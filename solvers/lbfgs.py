"""Limited-memory BFGS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective, unbounded
from bilevel._numerics.quasi_newton import Pairs
from bilevel._numerics.rows import chosen_rows, row_dots
from bilevel._numerics.wolfe import Search, jump, strong_wolfe
from bilevel._result import Solved, Status
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, demand_ranges
from bilevel.bounds.iterations import stationary
from bilevel.certificates.certificate import Constants
from bilevel.solvers.armijo import NOISE, end, final_statuses, rescaled

_RISE = 2.0  # what is believed of values, in jumps that were seen


@final
@dataclass(frozen=True)
class LBFGS(AbstractInnerSolver):
    """L-BFGS: y <- y - t B grad g(y), B the BFGS inverse Hessian of the last `memory` steps, t by strong Wolfe.

    Converges linearly on strongly convex objectives, in practice much faster; to a stationary point of a smooth
    objective that is bounded below. Steps whose curvature is not positive are not remembered. Near the rounding
    floor of the objective's values the line search goes by slopes, so that |grad g| can be brought down to its own
    floor: 1e-10 and less in float64.

    Cost: one gradient at y0 and one a trial step: 1.0 to 1.2 a step as a rule. The gradient at the returned point
    is known, so none is spent on the residual. Memory (2 memory + 5) q. Rows of a batch have their own steps,
    memory and line search and do not wait for one another; each call evaluates, and counts, all of them.

    With tol = 0 it goes on for `max_steps` steps or to the rounding floor, and both are success. Where values are
    rounded to less than their dtype, as under `torch.autocast`, the floor is measured: by how much values jump that a
    failed line search has seen next to one another. From there on it goes by slopes until these are noise as well.

    Source: Liu, Nocedal, "On the limited memory BFGS method for large scale optimization", Math. Program. 45 (1989);
    Nocedal, Wright, "Numerical optimization" (2006), algorithm 7.4.

    Args:
        tol: stop when |grad g| <= tol.
        max_steps: at most this many steps.
        memory: how many steps are remembered.

    Raises:
        ValueError: if `tol` or `max_steps` is negative, or `memory` less than 1.

    Example:
        >>> objective = Objective(lambda y: (y - 3).square().sum() / 2)
        >>> LBFGS(tol=1e-6).solve(objective, torch.zeros(2, dtype=torch.float64)).status.name
        'successful'
    """

    tol: float = 1e-8
    max_steps: int = 1000
    memory: int = 10

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, tol=AT_LEAST_0, max_steps=AT_LEAST_0, memory=AT_LEAST_1)

    @property
    def forgets_start(self) -> bool:
        return self.tol > 0

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        lead, eps = y0.shape[:-1], torch.finfo(y0.dtype).eps
        y = y0.detach().reshape(-1, y0.shape[-1]).clone()

        def evaluate(y: Tensor) -> tuple[Tensor, Tensor]:
            values, gradients = objective.value_and_gradient(y.reshape(y0.shape))
            return values.reshape(-1), gradients.reshape(y.shape)

        values, g = evaluate(y)
        again = rescaled(lambda multiple, tol: replace(self, tol=tol).solve(multiple, y0), objective, g, self.tol)
        if again is not None:
            return again
        memory = Pairs(self.memory, y)
        rows = [
            _Row(value, norm, eps, not self.tol)
            for value, norm in _numbers(values, torch.linalg.vector_norm(g, dim=-1))
        ]
        for row in rows:
            row.end(self)
        d = _begin(rows, [True] * len(rows), memory, g, torch.zeros_like(g))
        while any(row.status is None for row in rows):
            t = torch.tensor([[row.t] for row in rows], dtype=y.dtype, device=y.device)
            trial = torch.addcmul(y, t, d)
            values, gradients = evaluate(trial)
            found = _numbers(values, row_dots(gradients, d), torch.linalg.vector_norm(gradients, dim=-1))
            accepted = [row.send(*numbers) for row, numbers in zip(rows, found, strict=True)]
            if any(accepted):
                memory.push(
                    trial - y, gradients - g, [row.curvature * ok for row, ok in zip(rows, accepted, strict=True)]
                )
                y, g = chosen_rows(accepted, trial, y), chosen_rows(accepted, gradients, g)
            for row, ok in zip(rows, accepted, strict=True):
                if ok:
                    row.end(self)
            d = _begin(rows, [ok or row.retry for row, ok in zip(rows, accepted, strict=True)], memory, g, d)

        objective.tally.inner_steps += sum(row.steps for row in rows)
        norms = torch.linalg.vector_norm(g, dim=-1).reshape(lead)
        statuses = final_statuses([row.status for row in rows], self.tol)
        return Solved(y.reshape(y0.shape), statuses, norms, max((row.steps for row in rows), default=0))

    @property
    def tolerance(self) -> float | None:
        return self.tol or None

    def with_tolerance(self, tol: float) -> LBFGS:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> LBFGS:
        return replace(self, max_steps=steps)

    def solution_bound(self, constants: Constants, distance: float) -> float:
        if not self.tol:
            raise unbounded(self, "bounds.gradient_descent")
        return stationary(constants, self.tol)


@final
class _Row:
    """The numbers of one problem: where it stands, and its line search."""

    def __init__(self, value: float, norm: float, eps: float, measures: bool) -> None:
        self.value, self.norm, self.eps, self.measures = value, norm, eps, measures
        self.floor, self.trials = 0.0, [(0.0, 0.0, 0.0)]  # jumps of values that were seen; (t, phi, slope) of a search
        self.least_value, self.least_norm, self.idle = value, norm, 0
        self.steps, self.t, self.first, self.slope, self.curvature = 0, 0.0, 1.0, 0.0, 0.0
        self.plain, self.retry = True, False  # along -g; to be tried again along -g
        self.search: Search | None = None
        self.status: Status | None = None

    @property
    def noise(self) -> float:
        return max(NOISE * self.eps * abs(self.value), self.floor)

    def begin(self, slope: float) -> None:
        """Start a line search along a new direction."""
        self.slope, self.retry = slope, False
        self.first = min(1.0, 1.0 / self.norm) if self.plain else 1.0
        self.search = strong_wolfe(self.value, slope, self.first, self.noise)
        self.t = next(self.search)
        self.trials = [(0.0, self.value, slope)]

    def send(self, phi: float, slope: float, norm: float) -> bool:
        """Tell the line search what was found at its trial; whether that is the next point."""
        if self.status is not None or self.search is None:
            return False
        tried = self.t
        self.trials.append((tried, phi, slope))
        try:
            self.t = self.search.send((phi, slope))
            return False
        except StopIteration as stop:
            outcome: Status = stop.value
        if outcome is Status.line_search_failed and self.measures and (seen := _RISE * jump(self.trials)) > self.noise:
            self.floor, self.retry = seen, True  # along the same direction, by slopes
            return False
        if outcome is not Status.successful:
            if outcome is Status.line_search_failed and 0.5 * abs(self.slope) * self.first <= self.noise:
                outcome = Status.stagnated
            self.retry = not self.plain and outcome is not Status.stagnated
            self.plain = True
            if not self.retry:
                self.status, self.t = outcome, 0.0
            return False
        self.curvature, self.plain = tried * (slope - self.slope), False
        progress = phi < self.least_value - self.eps * abs(self.least_value) or norm < self.least_norm
        self.idle = 0 if progress else self.idle + 1
        self.least_value, self.least_norm = min(self.least_value, phi), min(self.least_norm, norm)
        self.value, self.norm, self.steps = phi, norm, self.steps + 1
        return True

    def end(self, solver: LBFGS) -> None:
        """Stop at a new point if there is reason to."""
        self.status = end(self.value, self.norm, self.idle, solver.tol)
        if self.status is None and self.steps >= solver.max_steps:
            self.status = Status.max_steps if solver.tol else Status.successful
        if self.status is not None:
            self.t = 0.0


def _begin(rows: list[_Row], new: list[bool], memory: Pairs, g: Tensor, d: Tensor) -> Tensor:
    """Directions for the rows that are to start a line search; zero in the rows that have ended."""
    new = [start and row.status is None for row, start in zip(rows, new, strict=True)]
    going = [row.status is None for row in rows]
    if not any(new):
        return chosen_rows(going, d, torch.zeros_like(d))
    retry = [row.retry and row.plain for row in rows]
    if any(retry):
        memory.forget(retry)
    d = chosen_rows(going, chosen_rows(new, -memory.product(g), d), torch.zeros_like(d))
    slopes = [slope for (slope,) in _numbers(row_dots(g, d))]
    lost = [start and not slope < 0 for start, slope in zip(new, slopes, strict=True)]
    if any(lost):  # rounding made the direction one of ascent
        memory.forget(lost)
        d = chosen_rows(lost, -g, d)
        slopes = [slope for (slope,) in _numbers(row_dots(g, d))]
    for row, start, again, slope in zip(rows, new, lost, slopes, strict=True):
        if start:
            row.plain = row.plain or again
            row.begin(slope)
    return d


def _numbers(*columns: Tensor) -> list[list[float]]:
    """The rows of a table of numbers; one transfer from the device."""
    numbers: list[list[float]] = torch.stack(columns, dim=-1).tolist()
    return numbers
