"""VRBO: x first, then y by differences on the same batches, over a Neumann series."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

from bilevel._calculus import AbstractProducts, Exact
from bilevel.algorithms.algorithm import AbstractAlgorithm, RowStep
from bilevel.algorithms.engine.nested import Nested
from bilevel.algorithms.engine.neumann import Neumann, series_beside
from bilevel.algorithms.engine.preset import AbstractPreset
from bilevel.algorithms.engine.steps import Schedule, Step, demand_steps, number
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, demand_ranges


@final
@dataclass(frozen=True)
class VRBO(AbstractPreset):
    """VRBO: every `period` steps (u, w) = S on all the data; x' = P(x - gamma w); then T steps of y at the new x'.

        S(x, y) = (grad_y g, grad_x f - G v),   v = eta sum_{k = 0, ..., Q} (I - eta H_k) ... (I - eta H_1) grad_y f
        for t = 0, ..., T     (u, w) <- (u, w) + S(x', y) - S(old);  old = (x', y);  y <- y - rho u, but for t = T

    with the same batches at both points, new ones for each t; the first old point is (x, y), which x has left. The bias
    of the series is that of `StocBiO`, and a floor here: with few products nothing else is left.

    Cost: 2 (T + 1) (Q + 3) calls for each sample of a batch, and n (Q + 2) + m every `period` steps. Memory: a
    direction, and on the way three points and two directions. Worst or near it in calls on every benchmark here.

    Converges: |grad Phi|^2 <= e, to within the bias, after O(e^-3/2) calls, with constant steps.

    Source: Yang, Ji, Liang, "Provably faster algorithms for bilevel optimization", NeurIPS 2021.

    Args:
        inner_step: rho, of y, or an optimizer.
        outer_step: gamma, of x, or an optimizer.
        linear_step: eta, of the series, which no schedule changes; None: that of y.
        inner_steps: T.
        linear_steps: Q, the products of the series; it has one more term.
        period: steps between full evaluations; None: as many as see all samples once, at one batch a step.
        schedule: step -> the factor of both steps; None: constant.
        outer_schedule: the same of gamma alone, where it is another one.
        products: with second derivatives; `FiniteDifferences()` where operations have no double backward.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive, or a number of steps below 1; from `minimize`, if data are batches only.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> vrbo = VRBO(0.5, 0.3, inner_steps=3, linear_steps=3)
        >>> round(float(minimize(problem, x0, x0, algorithm=vrbo, max_steps=60).x), 4)
        3.0
    """

    inner_step: Step
    outer_step: Step
    linear_step: float | None = None
    inner_steps: int = 10
    linear_steps: int = 10
    period: int | None = None
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None
    products: AbstractProducts = field(default_factory=Exact)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, inner_steps=AT_LEAST_1, linear_steps=AT_LEAST_1, period=AT_LEAST_1)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step)

    def combination(self) -> Nested:
        return Nested(
            self.inner_step,
            self.outer_step,
            inner_steps=self.inner_steps,
            direction=Neumann(self.linear_steps + 1, number(self.inner_step, self.linear_step), self.products),
            period=self.period,
            schedule=self.schedule,
            outer_schedule=self.outer_schedule,
        )

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[Any] | None:
        return series_beside(self.loop, self.linear_step, inner_step, outer_step)
