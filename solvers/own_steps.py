"""The steps that an inner problem consists of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractUnrollable, Objective, OwnStep, State
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Solved, judged_rows
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, demand_ranges
from bilevel.requirements.properties import Feature


@final
@dataclass(frozen=True)
class OwnSteps(AbstractUnrollable):
    """y_{k+1} = step(x, y_k, k) for k < N: the steps of an inner problem that is an iteration, neither more nor less.

    Completing the steps is success, unless y is not finite. The residual is |y_N - y_{N-1}|.

    Cost: N steps, and N gradients of g where the steps use them. Memory O(q).

    Args:
        steps: N; None: as many as the inner problem says.

    Raises:
        ValueError: if `steps` is negative; from `solve`, if the inner problem is no iteration of its own.

    Example:
        >>> from bilevel import ITD, BilevelProblem, hypergradient
        >>> from bilevel.inner_problems import Iteration
        >>> problem = BilevelProblem(
        ...     lambda x, y: y, inner=Iteration(lambda x, y, k: x * y, steps=3)
        ... )
        >>> hypergradient(
        ...     problem, torch.tensor(2.0), torch.tensor(1.0), estimator=ITD(OwnSteps())
        ... ).grad  # 3 x^2
        tensor(12.)
    """

    steps: int | None = None
    max_steps: int = field(init=False, default=0, repr=False)  # known when the problem is
    tol: float | None = field(init=False, default=None, repr=False)
    min_steps: int = field(init=False, default=0, repr=False)
    _gradient: bool = field(init=False, default=False, repr=False)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, steps=AT_LEAST_0)

    @property
    def heeds(self) -> frozenset[Feature]:
        return frozenset({Feature.own_steps})

    @property
    def needs_gradient(self) -> bool:
        return self._gradient

    def with_steps(self, steps: int) -> OwnSteps:
        return OwnSteps(steps)

    def tuned(self, objective: Objective, y0: Tensor) -> OwnSteps:
        own = _own(objective)
        made = OwnSteps(self.steps)
        object.__setattr__(made, "max_steps", own.count if self.steps is None else self.steps)
        object.__setattr__(made, "_gradient", own.needs_gradient)
        return made

    def begin(self, y0: Tensor) -> State:
        return (y0,)

    def advance(self, objective: Objective, gradient: Tensor | None, state: State, index: int) -> State:
        return (_own(objective).step(state[0], gradient, index),)

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        tuned = self.tuned(objective, y0)
        y = before = y0.detach().clone()
        with torch.no_grad():
            for k in range(tuned.max_steps):
                gradient = objective.gradient(y) if tuned.needs_gradient else None
                y, before = tuned.advance(objective, gradient, (y,), k)[0].detach(), y
        objective.tally.inner_steps += tuned.max_steps * y.shape[:-1].numel()
        moved = safe_row_norms(y - before)
        residual = torch.where(y.isfinite().all(-1), moved, math.nan)
        return Solved(y, judged_rows(residual, math.inf), residual, tuned.max_steps)


def _own(objective: Objective) -> OwnStep:
    if objective.own is None:
        raise ValueError(
            "`OwnSteps` takes the steps of an inner problem that is an iteration, and this one is none. Use"
            " `Iterate(GradientDescent(), max_steps=N)`, or `BilevelProblem(f, inner=Iteration(step, steps=N))`."
        )
    return objective.own
