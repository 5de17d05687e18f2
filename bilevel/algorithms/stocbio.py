"""stocBiO: inner steps, a Neumann series on batches, one step of x."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

from bilevel._calculus import AbstractProducts, Exact
from bilevel.algorithms.algorithm import AbstractAlgorithm, RowStep
from bilevel.algorithms.engine.neumann import Neumann, series_beside
from bilevel.algorithms.engine.preset import AbstractPreset
from bilevel.algorithms.engine.steps import Schedule, Step, demand_steps, number
from bilevel.algorithms.engine.turns import Turns
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, demand_ranges


@final
@dataclass(frozen=True)
class StocBiO(AbstractPreset):
    """stocBiO: T steps of y, then x along grad_x f - G v with v a Neumann series on batches of its own.

        T times  y <- y - rho_t grad_y g;      v = eta sum_{k = 0, ..., Q} (I - eta H_k) ... (I - eta H_1) grad_y f;
        x <- P(x - gamma_t (grad_x f - G v))

    Each step of y has a batch of g of its own, so have H_1, ..., H_Q, which are the same in all terms, and G; the
    gradients of f are of one batch. v is short of v* = H^-1 grad_y f by (I - eta H)^(Q + 1) v* in the mean: a bias of
    at most |G| (1 - eta mu)^(Q + 1) |v*| that no schedule removes. `AmIGO`, whose v goes on, has none at the same cost.

    Cost: (T + Q + 2) calls for each sample of a batch. Memory: two vectors like y, the graph of one gradient.

    Converges: for g strongly convex in y, to within the bias and the noise of the batches.

    Source: Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design", ICML 2021, algorithm 2.

    Args:
        inner_step: rho, of y, or an optimizer.
        outer_step: gamma, of x, or an optimizer.
        linear_step: eta, of the series, which no schedule changes; None: that of y.
        inner_steps: T.
        linear_steps: Q, the products of the series; it has one more term.
        schedule: step -> the factor of rho and gamma; None: constant.
        outer_schedule: the same of gamma alone, where it is another one.
        products: with second derivatives; `FiniteDifferences()` where operations have no double backward.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive, or a number of steps below 1.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> stocbio = StocBiO(0.5, 0.5, inner_steps=3, linear_steps=3)
        >>> round(float(minimize(problem, x0, x0, algorithm=stocbio, max_steps=100).x), 6)
        3.0
    """

    inner_step: Step
    outer_step: Step
    linear_step: float | None = None
    inner_steps: int = 10
    linear_steps: int = 10
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None
    products: AbstractProducts = field(default_factory=Exact)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, inner_steps=AT_LEAST_1, linear_steps=AT_LEAST_1)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step)

    def combination(self) -> Turns:
        return Turns(
            self.inner_step,
            self.outer_step,
            inner_steps=self.inner_steps,
            direction=Neumann(self.linear_steps + 1, number(self.inner_step, self.linear_step), self.products),
            schedule=self.schedule,
            outer_schedule=self.outer_schedule,
        )

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[Any] | None:
        return series_beside(self.loop, self.linear_step, inner_step, outer_step)
