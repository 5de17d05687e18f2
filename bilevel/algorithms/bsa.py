"""BSA and TTSA: inner steps, one random term of a Neumann series, one step of x."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

from bilevel._calculus import AbstractProducts, Exact
from bilevel.algorithms.algorithm import AbstractAlgorithm, RowStep
from bilevel.algorithms.engine.neumann import RandomizedNeumann, series_beside
from bilevel.algorithms.engine.preset import AbstractPreset
from bilevel.algorithms.engine.steps import Schedule, Step, demand_steps, number
from bilevel.algorithms.engine.turns import Turns
from bilevel.algorithms.schedule import Power
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, demand_ranges


@final
@dataclass(frozen=True)
class BSA(AbstractPreset):
    """BSA: T steps of y, then x along grad_x f - G v with v one random term of a Neumann series, k ~ U{0, ..., Q - 1}.

        T times  y <- y - rho_t grad_y g;      v = Q eta (I - eta H_k) ... (I - eta H_1) grad_y f;
        x <- P(x - gamma_t (grad_x f - G v))

    The mean of v is eta sum_{k < Q} (I - eta H)^k grad_y f, short of H^-1 grad_y f as in `StocBiO`; it takes half the
    products and is noisier. Each step of y and each H has a batch of g of its own, and so has G.

    Cost: (T + (Q - 1) / 2 + 2) calls for each sample of a batch, on average. Memory: one vector like y, the graph of
    one gradient.

    Converges: for g strongly convex in y, to within the bias of the series, with steps of the order of t^-1/2.

    Source: Ghadimi, Wang, "Approximation methods for bilevel programming", 2018.

    Args:
        inner_step: rho, of y, or an optimizer.
        outer_step: gamma, of x, or an optimizer.
        linear_step: eta, of the series, which no schedule changes; None: that of y.
        inner_steps: T.
        linear_steps: Q.
        seed: of k.
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
        >>> bsa = BSA(0.5, 0.5, inner_steps=3, linear_steps=3)
        >>> round(float(minimize(problem, x0, x0, algorithm=bsa, max_steps=200).x), 2)
        3.0
    """

    inner_step: Step
    outer_step: Step
    linear_step: float | None = None
    inner_steps: int = 10
    linear_steps: int = 10
    seed: int = 0
    schedule: Schedule | None = Power(1 / 2)
    outer_schedule: Schedule | None = None
    products: AbstractProducts = field(default_factory=Exact)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, inner_steps=AT_LEAST_1, linear_steps=AT_LEAST_1)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step)

    def combination(self) -> Turns:
        eta = number(self.inner_step, self.linear_step)
        return Turns(
            self.inner_step,
            self.outer_step,
            inner_steps=self.inner_steps,
            direction=RandomizedNeumann(self.linear_steps, eta, self.seed, self.products),
            schedule=self.schedule,
            outer_schedule=self.outer_schedule,
        )

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[Any] | None:
        return series_beside(self.loop, self.linear_step, inner_step, outer_step)


@final
@dataclass(frozen=True)
class TTSA(AbstractPreset):
    """TTSA: `BSA` with one step of y, on a faster time scale than x: rho_t ~ t^-2/5, gamma_t ~ t^-3/5.

        y <- y - rho_t grad_y g;   v = Q eta (I - eta H_k) ... (I - eta H_1) grad_y f;   x <- P(x - gamma_t (f_x - G v))

    with f_x = grad_x f and k ~ U{0, ..., Q - 1}.

    Cost: ((Q - 1) / 2 + 3) calls for each sample of a batch, on average. Memory: that of `BSA`.

    Converges: for g strongly convex in y, E |grad Phi|^2 is O(T^-2/5) after T steps, to within the bias of the series.

    Source: Hong, Wai, Wang, Yang, "A two-timescale stochastic algorithm framework for bilevel optimization: complexity
    analysis and application to actor-critic", SIAM J. Optim. 33 (2023).

    Args:
        inner_step: rho, of y, or an optimizer.
        outer_step: gamma, of x, or an optimizer.
        linear_step: eta, of the series, which no schedule changes; None: that of y.
        linear_steps: Q.
        seed: of k.
        schedule: step -> the factor of rho; None: constant.
        outer_schedule: step -> the factor of gamma; None: that of rho.
        products: with second derivatives; `FiniteDifferences()` where operations have no double backward.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive, or `linear_steps` below 1.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> ttsa = TTSA(0.5, 0.5, linear_steps=3)
        >>> round(float(minimize(problem, x0, x0, algorithm=ttsa, max_steps=300).x), 2)
        3.0
    """

    inner_step: Step
    outer_step: Step
    linear_step: float | None = None
    linear_steps: int = 10
    seed: int = 0
    schedule: Schedule | None = Power(2 / 5)
    outer_schedule: Schedule | None = Power(3 / 5)
    products: AbstractProducts = field(default_factory=Exact)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, linear_steps=AT_LEAST_1)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step)

    def combination(self) -> Turns:
        eta = number(self.inner_step, self.linear_step)
        return Turns(
            self.inner_step,
            self.outer_step,
            direction=RandomizedNeumann(self.linear_steps, eta, self.seed, self.products),
            schedule=self.schedule,
            outer_schedule=self.outer_schedule,
        )

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[Any] | None:
        return series_beside(self.loop, self.linear_step, inner_step, outer_step)
