"""Plain iteration of the map whose fixed point y is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractUnrollable, Objective, State, unbounded
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Solved, Status, judged_rows
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, demand_ranges
from bilevel.bounds.iterations import stationary
from bilevel.certificates.certificate import Constants
from bilevel.requirements.properties import Feature
from bilevel.solvers._fixed_points import allowed, demand_map, ended, image_of, spectral_radius

_GROWN = 1e6  # times the first residual: it is looked at as well
_BETTER = 0.999  # of the least residual before
_LOOKS = 10  # without a decline: T does not contract where the iterates are, whatever it does at one of them
_LOOK = 50  # steps, after which a residual that has not declined makes the spectral radius be looked at


@final
@dataclass(frozen=True)
class FixedPointIteration(AbstractUnrollable):
    """y_{k+1} = y_k + damping (T(x, y_k) - y_k), until |y - T(x, y)| <= max(tol, rtol |y|).

    Converges, from near y*, where the spectral radius of I - damping (I - dT/dy) is below 1: without damping, where T
    contracts; with damping = 1/2 also where the eigenvalues of dT/dy are within 1 of the point -1. The error falls like
    the powers of that radius. Where the residual has not declined for fifty steps, or the steps are used up, the radius
    of dT/dy is estimated: if it is at least 1 the solve ends with `Status.expanding`, and so it does in a cycle,
    where no residual declines. `Anderson` takes fewer steps, and needs no contraction.

    These are the steps that `ITD` differentiates, in all its forms.

    Cost: T once a step, and once for the residual that is returned, each counted as a gradient. Memory O(q). Where it
    fails, 16 products with dT/dy.

    Args:
        max_steps: at most so many steps.
        tol: stop when the residual is at most this; None or 0: take all the steps.
        rtol: or at most this times |y|, where that is more; needs a `tol`.
        damping: the part of the way to T(x, y) that is gone.
        min_steps: take at least so many, for `ITD`, which goes on until its derivative is right if this is at least 1.

    Raises:
        ValueError: if a number is out of range; from `solve`, if the inner problem is no fixed point.

    Example:
        >>> objective = Objective(lambda y: y.sum(-1), fixed_point=torch.cos)
        >>> FixedPointIteration().solve(objective, torch.zeros(1)).value
        tensor([0.7391])
    """

    max_steps: int = 1000
    tol: float | None = 1e-8
    rtol: float = 0.0
    damping: float = 1.0
    min_steps: int = 0

    def __post_init__(self) -> None:
        demand_types(self)
        hints = {"tol": "Pass None to take all the steps."}
        demand_ranges(self, hints, max_steps=AT_LEAST_0, tol=AT_LEAST_0, rtol=AT_LEAST_0)
        if not 0 < self.damping < 2:
            raise ValueError(f"`FixedPointIteration(damping=...)` must be between 0 and 2. Got {self.damping}.")
        if not 0 <= self.min_steps <= self.max_steps:
            raise ValueError(
                f"`FixedPointIteration(min_steps=...)` must be between 0 and max_steps={self.max_steps}. Got"
                f" {self.min_steps}."
            )
        if self.rtol and not self.tol:
            raise ValueError("`FixedPointIteration(rtol=...)` needs a `tol` beside it. Pass `tol=1e-12`, say.")

    @property
    def heeds(self) -> frozenset[Feature]:
        return frozenset({Feature.fixed_point})

    @property
    def needs_gradient(self) -> bool:
        return False

    @property
    def residual_step(self) -> float | None:
        return self.damping

    @property
    def forgets_start(self) -> bool:
        return bool(self.tol)

    @property
    def tolerance(self) -> float | None:
        return self.tol or None

    def with_tolerance(self, tol: float) -> FixedPointIteration:
        return replace(self, tol=tol, rtol=0.0)

    def with_steps(self, steps: int) -> FixedPointIteration:
        return replace(self, max_steps=steps, min_steps=0)

    def solution_bound(self, constants: Constants, distance: float) -> float:
        if not self.tol or self.rtol:
            raise unbounded(self, "bounds.gradient_descent")
        return stationary(constants, self.tol)

    def allowed(self, y: Tensor) -> Tensor | float:
        return allowed(y, self.tol or 0.0, self.rtol) if self.rtol else self.tol or 0.0

    def missed(self, objective: Objective, y: Tensor, statuses: tuple[Status, ...]) -> tuple[Status, ...]:
        if not bool(y.isfinite().any()):
            return statuses
        wide = (spectral_radius(objective, y) >= 1).reshape(-1).tolist()  # NaN compares false
        rows = zip(statuses, wide, strict=True)
        return tuple(Status.expanding if large and not status.ok else status for status, large in rows)

    def tuned(self, objective: Objective, y0: Tensor) -> FixedPointIteration:
        demand_map("FixedPointIteration", objective)
        return self

    def begin(self, y0: Tensor) -> State:
        return (y0,)

    def advance(self, objective: Objective, gradient: Tensor | None, state: State, index: int) -> State:
        demand_map("FixedPointIteration", objective)
        assert objective.fixed_point is not None
        objective.tally.gradients += state[0].shape[:-1].numel()
        return (self._moved(state[0], objective.fixed_point(state[0])),)

    def _moved(self, y: Tensor, image: Tensor) -> Tensor:
        return image if self.damping == 1.0 else y + self.damping * (image - y)

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        demand_map("FixedPointIteration", objective)
        y = y0.detach().clone()
        expands = torch.zeros(y.shape[:-1], dtype=torch.bool, device=y.device)
        first = lately = residual = torch.full_like(expands, math.inf, dtype=y.dtype)
        least, looks = lately, torch.zeros_like(lately)  # of the steps before the last look; looks without a decline
        steps = 0
        while True:
            image = image_of(objective, y)
            residual = safe_row_norms(y - image)
            first = residual if not steps else first
            limit = torch.zeros_like(residual) + self.allowed(y)
            moving = ((residual > limit) | (steps < self.min_steps)) & residual.isfinite() & ~expands
            if not self.tol:
                moving = torch.ones_like(moving)
            if steps == self.max_steps or not bool(moving.any()):
                break
            grown = residual > _GROWN * first
            lately = torch.minimum(lately, residual)
            if self.tol and steps and (steps % _LOOK == 0 or bool((moving & grown).any())):
                look = steps % _LOOK == 0
                looks = torch.where(lately > _BETTER * least, looks + 1, 0.0) if look else looks
                idle = moving & (grown | (looks > 0))
                if bool(idle.any()):
                    expands = expands | (looks >= _LOOKS) | idle & (spectral_radius(objective, y) >= 1)
                    moving = moving & ~expands
                if look:
                    least, lately = torch.minimum(least, lately), torch.full_like(lately, math.inf)
            y = torch.where(moving.unsqueeze(-1), self._moved(y, image), y)
            steps += 1
            objective.tally.inner_steps += int(moving.sum())
        if not self.tol:
            return Solved(y, judged_rows(residual, math.inf), residual, steps)
        statuses = ended(residual, limit, y, torch.full_like(first, math.inf), first)
        if not all(status.ok for status in statuses):
            statuses = self.missed(objective, y, statuses)
            stuck = (expands | (looks > 1)).reshape(-1).tolist()
            rows = zip(statuses, stuck, strict=True)
            statuses = tuple(Status.expanding if end is Status.max_steps and on else end for end, on in rows)
        return Solved(y, statuses, residual, steps)
