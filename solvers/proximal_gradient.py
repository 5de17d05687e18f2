"""The proximal gradient method."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractUnrollable, Objective, State
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Solved, judged_rows
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE, demand_ranges
from bilevel.requirements.properties import Feature
from bilevel.solvers._on_the_way import curvature_on_the_way, lost_its_way


@final
@dataclass(frozen=True)
class ProximalGradient(AbstractUnrollable):
    """y_{k+1} = prox_{t h}(y_k - t grad_y g(x, y_k)): gradient descent on g, then the proximal map of h.

    Converges for convex g and 0 < t < 2 / L, L the largest curvature of g, like (1 - mu t)^k where g is strongly
    convex. The residual is |y_{k+1} - y_k| / t, the length of the generalized gradient; y is the last prox, so that
    entries which the map sets to zero are exactly zero. Without a non-smooth term it is gradient descent.

    Cost: one gradient and one proximal map a step, and one of each for the residual. Memory O(q). `ITD` differentiates
    its steps, through the map as well.

    Source: Beck, Teboulle, "A fast iterative shrinkage-thresholding algorithm for linear inverse problems", SIAM J.
    Imaging Sci. 2 (2009), section 1.

    Args:
        step: t; None: 1 / L, from an upper estimate of the curvature at y0, by some 10 to 20 Hessian products; and
            where that fails, from the largest curvature on the way, as `Iterate` finds it.
        max_steps: at most so many steps.
        tol: stop when the residual is at most this; None or 0: take all the steps.
        min_steps: take at least so many, for `ITD`, which goes on until its derivative is right if this is at least 1.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> prox = lambda v, t: (v - t).relu()  # of h = y where y >= 0
        >>> objective = Objective(lambda y: (y - 3).square().sum() / 2, prox=prox)
        >>> ProximalGradient(step=1.0, tol=1e-6).solve(objective, torch.zeros(2)).value
        tensor([2., 2.])
    """

    step: float | None = None
    max_steps: int = 1000
    tol: float | None = 1e-8
    min_steps: int = 0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, {"tol": "Pass None to take all the steps."}, step=POSITIVE, tol=AT_LEAST_0)
        if self.max_steps < 0 or not 0 <= self.min_steps <= self.max_steps:
            raise ValueError(
                f"`ProximalGradient` needs 0 <= min_steps <= max_steps. Got {self.min_steps} and {self.max_steps}."
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

    def with_tolerance(self, tol: float) -> ProximalGradient:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> ProximalGradient:
        return replace(self, max_steps=steps, min_steps=0)

    def tuned(self, objective: Objective, y0: Tensor) -> ProximalGradient:
        if self.step is not None:
            return self
        return self._with_curvature(objective.largest_curvature(y0))

    def tuned_on_the_way(self, objective: Objective, y0: Tensor) -> ProximalGradient | None:
        if self.step is not None:
            return None
        largest = objective.largest_curvature(y0)
        largest = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest)).max()
        start = largest.expand(y0.shape[:-1])
        found = curvature_on_the_way(objective, y0, start, self.max_steps, self.tol or 0.0, step_for_prox=True)
        return self._with_curvature(found) if bool((found > start).any()) else None

    def _with_curvature(self, curvature: Tensor) -> ProximalGradient:
        largest = float(curvature.max())  # one step for all rows
        return replace(self, step=1 / largest if largest > 0 and math.isfinite(largest) else 1.0)

    def begin(self, y0: Tensor) -> State:
        return (y0,)

    def advance(self, objective: Objective, gradient: Tensor | None, state: State, index: int) -> State:
        assert gradient is not None
        assert self.step is not None
        v = state[0] - self.step * gradient
        return (v if objective.prox is None else objective.prox(v, self.step),)

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        found, norms = self.tuned(objective, y0)._run(objective, y0)
        safer = self.tuned_on_the_way(objective, y0) if lost_its_way(found.status, norms) else None
        return found if safer is None else safer._run(objective, y0)[0]

    def _run(self, objective: Objective, y0: Tensor) -> tuple[Solved, list[Tensor]]:
        """The steps, and the residuals on the way."""
        tol, norms = self.tol or 0.0, list[Tensor]()
        assert self.step is not None
        y, steps = y0.detach().clone(), 0
        with torch.no_grad():
            while True:
                gradient = objective.gradient(y)
                (moved,) = self.advance(objective, gradient, (y,), steps)
                residual = safe_row_norms(moved - y) / self.step
                norms.append(residual)
                moving = ((residual > tol) | (steps < self.min_steps)) & residual.isfinite()
                if steps == self.max_steps or not moving.any():
                    break
                y, steps = torch.where(moving.unsqueeze(-1), moved, y), steps + 1
                objective.tally.inner_steps += int(moving.sum())
        return Solved(y, judged_rows(residual, tol or math.inf), residual, steps), norms
