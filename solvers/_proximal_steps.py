"""The loop around proximal steps: residuals, the manifold that they settle on, and the point that is returned."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import TypeVar, final

import torch
from torch import Tensor

from bilevel._inner import AbstractUnrollable, Objective, State
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Solved, judged_rows
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE, demand_ranges
from bilevel.requirements.properties import Feature
from bilevel.solvers._on_the_way import curvature_on_the_way, lost_its_way

_LOWER = 0.3  # of the residual to stop at, where that of the point which is returned was above the tolerance

Own = TypeVar("Own", bound="AbstractProximalSteps")


class AbstractProximalSteps(AbstractUnrollable):
    """Steps of one length t made of gradients of g and proximal maps of h; a final class has these fields.

    Attributes:
        step: t; None: 1 / L, L an upper estimate of the largest curvature at y0, or on the way where that fails.
        max_steps: at most so many steps.
        tol: where the residual |y - prox_{t h}(y - t grad_y g)| / t is to end; None or 0: take all the steps.
        min_steps: take at least so many, for `ITD`.
        settled: and go on until the manifold of y has been the same for so many steps.
    """

    step: float | None
    settled: int

    def check(self) -> None:
        """Refuse numbers out of range.

        Raises:
            ValueError: naming the argument.
        """
        hints = {"tol": "Pass None to take all the steps.", "settled": "Pass 0 to stop by the residual alone."}
        demand_ranges(self, hints, step=POSITIVE, tol=AT_LEAST_0, settled=AT_LEAST_0)
        if self.max_steps < 0 or not 0 <= self.min_steps <= self.max_steps:
            raise ValueError(
                f"`{type(self).__name__}` needs 0 <= min_steps <= max_steps. Got {self.min_steps} and {self.max_steps}."
            )

    @property
    def heeds(self) -> frozenset[Feature]:
        return frozenset({Feature.prox})

    @property
    def residual_step(self) -> float | None:
        return self.step

    @property
    def forgets_start(self) -> bool:
        return bool(self.tol)

    @property
    def tolerance(self) -> float | None:
        return self.tol or None

    @abc.abstractmethod
    def with_step(self: Own, step: float) -> Own:
        """The same with this t."""

    @abc.abstractmethod
    def solution(self, objective: Objective, state: State, gradient: Tensor) -> Tensor:
        """The y to return: an image of the proximal map, so that what it sets to zero is zero."""

    def tuned(self: Own, objective: Objective, y0: Tensor) -> Own:
        own = self.shaped(objective)
        return own if own.step is not None else own._with_curvature(objective.largest_curvature(y0))

    def shaped(self: Own, objective: Objective) -> Own:
        """The same with what its state takes from the objective; most take nothing."""
        return self

    def tuned_on_the_way(self: Own, objective: Objective, y0: Tensor) -> Own | None:
        if self.step is not None:
            return None
        largest = objective.largest_curvature(y0)
        largest = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest)).max()
        start = largest.expand(y0.shape[:-1])
        found = curvature_on_the_way(objective, y0, start, self.max_steps, self.tol or 0.0, step_for_prox=True)
        return self.shaped(objective)._with_curvature(found) if bool((found > start).any()) else None

    def _with_curvature(self: Own, curvature: Tensor) -> Own:
        largest = float(curvature.max())  # one step for all rows
        return self.with_step(1 / largest if largest > 0 and math.isfinite(largest) else 1.0)

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        found, norms = _run(self.tuned(objective, y0), objective, y0)
        safer = self.tuned_on_the_way(objective, y0) if lost_its_way(found.status, norms) else None
        return found if safer is None else _run(safer, objective, y0)[0]


def _run(solver: AbstractProximalSteps, objective: Objective, y0: Tensor) -> tuple[Solved, list[Tensor]]:
    """The steps, and the residuals on the way.

    Where the residual of what is returned is above the tolerance though that of the steps was not, they go on.
    """
    assert solver.step is not None
    tol, norms, steps = solver.tol or 0.0, list[Tensor](), 0
    aim, settling = tol, Settling(objective, solver.step, solver.settled if solver.tol else 0)
    with torch.no_grad():
        state = solver.begin(y0.detach().clone())
        while True:
            gradient = objective.gradient(state[0])
            new = solver.advance(objective, gradient, state, steps)
            residual = safe_row_norms(solver.moved(state, new)) / solver.step
            norms.append(residual)
            low = residual <= aim
            moving = (~low | (steps < solver.min_steps)) & residual.isfinite()
            moving = moving | settling.still(state[0], gradient, low, residual)
            if steps == solver.max_steps or not moving.any():
                y = solver.solution(objective, state, gradient)
                if y is not state[0]:  # whose residual is known
                    residual = _residual(objective, y, objective.last_gradient(y), solver.step)
                if steps == solver.max_steps or not tol or not bool((residual > tol).any()):
                    return Solved(y, judged_rows(residual, tol or math.inf), residual, steps), norms
                aim, moving = _LOWER * aim, residual > tol
            state = tuple(torch.where(moving.unsqueeze(-1), n, o) for n, o in zip(new, state, strict=True))
            steps += 1
            objective.tally.inner_steps += int(moving.sum())


def image_of_steps(objective: Objective, y: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The proximal gradient step from y, and its residual `(*batch,)`: the point that a solver is about to return."""
    with torch.no_grad():
        v = y - step * objective.gradient(y)
        y = v if objective.prox is None else objective.prox(v, step)
        gradient = objective.last_gradient(y)
        v = y - step * gradient
        moved = (v if objective.prox is None else objective.prox(v, step)) - y
        return y, safe_row_norms(moved) / step.squeeze(-1)


def _residual(objective: Objective, y: Tensor, gradient: Tensor, step: float) -> Tensor:
    v = y - step * gradient
    return safe_row_norms((v if objective.prox is None else objective.prox(v, step)) - y) / step


@final
class Settling:
    """Whether the manifold of y has been the same for a number of steps; looked at only where the residual is low.

    Args:
        objective: whose `active` says what the manifold is; without one there is none to be settled.
        step: of the proximal map.
        settled: the number of steps.
    """

    def __init__(self, objective: Objective, step: float | Tensor, settled: int) -> None:
        self.active, self.step, self.settled = objective.active, step, settled
        self.last: Tensor | None = None
        self.count: Tensor | None = None

    def still(self, y: Tensor, gradient: Tensor, low: Tensor, residual: Tensor) -> Tensor:
        """Which rows have a low residual and a manifold that is still to settle: `(*batch,)`."""
        active, step = self.active, self.step
        return self.at(None if active is None else lambda: active(y - step * gradient, step), low, residual)

    def at(self, manifold: Callable[[], Tensor] | None, low: Tensor, residual: Tensor) -> Tensor:
        """The same for codes of the manifold that are made where they are looked at."""
        near = low & (residual > 0)  # where nothing moves at all, nothing is to be waited for
        if manifold is None or not self.settled or not bool(near.any()):
            self.last = self.count = None
            return torch.zeros_like(low)
        codes = manifold()
        if self.last is None or self.count is None:
            self.last, self.count = codes, torch.zeros_like(residual)
        else:
            same = (codes == self.last).all(-1)
            self.last, self.count = codes, torch.where(near & same, self.count + 1, 0.0)
        return near & (self.count < self.settled) & (codes.shape[-1] > 0)
