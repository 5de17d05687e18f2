"""MRBO and SUSTAIN: recursive momentum of y and x over a Neumann series."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

from bilevel._calculus import AbstractProducts, Exact
from bilevel.algorithms.algorithm import AbstractAlgorithm, RowStep
from bilevel.algorithms.engine.neumann import Neumann, RandomizedNeumann, series_beside
from bilevel.algorithms.engine.preset import AbstractPreset
from bilevel.algorithms.engine.recursive import Storm
from bilevel.algorithms.engine.single_loop import SingleLoop
from bilevel.algorithms.engine.steps import Schedule, Step, demand_steps, number
from bilevel.algorithms.schedule import Power
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, demand_ranges


@final
@dataclass(frozen=True)
class MRBO(AbstractPreset):
    """MRBO: y and x at once, along recursive momenta u of grad_y g and w of the hypergradient of `StocBiO`.

        S(x, y) = (grad_y g, grad_x f - G v),   v = eta sum_{k = 0, ..., Q} (I - eta H_k) ... (I - eta H_1) grad_y f
        (u, w) <- S(x, y) + (1 - e_t) ((u, w) - S((x, y)_old));    y <- y - rho_t u;    x <- P(x - gamma_t w)

    with the same batches at both points: one of g for grad_y g and G, Q for the H_k, one of f. (u, w) begins with S at
    the start. The bias of the series is that of `StocBiO`.

    Cost: 2 (Q + 3) calls for each sample of a batch. Memory: a point and a direction, 2 (q + p) numbers.

    Converges: |grad Phi|^2 <= e, to within the bias, after O(e^-3/2) calls, with steps of the order of t^-1/3 and e_t
    of t^-2/3.

    Source: Yang, Ji, Liang, "Provably faster algorithms for bilevel optimization", NeurIPS 2021.

    Args:
        inner_step: rho, of y, or an optimizer.
        outer_step: gamma, of x, or an optimizer.
        linear_step: eta, of the series, which no schedule changes; None: that of y.
        linear_steps: Q, the products of the series; it has one more term.
        momentum: step -> e_t, cut at 1.
        schedule: step -> the factor of both steps; None: constant.
        outer_schedule: the same of gamma alone, where it is another one.
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
        >>> mrbo = MRBO(0.5, 0.3, linear_steps=3)
        >>> round(float(minimize(problem, x0, x0, algorithm=mrbo, max_steps=200).x), 3)
        3.0
    """

    inner_step: Step
    outer_step: Step
    linear_step: float | None = None
    linear_steps: int = 10
    momentum: Schedule = Power(2 / 3)
    schedule: Schedule | None = Power(1 / 3)
    outer_schedule: Schedule | None = None
    products: AbstractProducts = field(default_factory=Exact)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, linear_steps=AT_LEAST_1)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step)

    def combination(self) -> SingleLoop:
        return SingleLoop(
            self.inner_step,
            self.outer_step,
            direction=Neumann(self.linear_steps + 1, number(self.inner_step, self.linear_step), self.products),
            reduction=Storm(self.momentum),
            schedule=self.schedule,
            outer_schedule=self.outer_schedule,
        )

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[Any] | None:
        return series_beside(self.loop, self.linear_step, inner_step, outer_step)


@final
@dataclass(frozen=True)
class SUSTAIN(AbstractPreset):
    """SUSTAIN: `MRBO` with one random term of the series, v = Q eta (I - eta H_k) ... (I - eta H_1) grad_y f.

    k ~ U{0, ..., Q - 1}, new at each step and the same at both points of a step.

    Cost: 2 ((Q - 1) / 2 + 3) calls for each sample of a batch, on average. Memory: that of `MRBO`.

    Converges: as `MRBO`.

    Source: Khanduri, Zeng, Hong, Wai, Wang, Yang, "A near-optimal algorithm for stochastic bilevel optimization via
    double-momentum", NeurIPS 2021.

    Args:
        inner_step: rho, of y, or an optimizer.
        outer_step: gamma, of x, or an optimizer.
        linear_step: eta, of the series, which no schedule changes; None: that of y.
        linear_steps: Q.
        seed: of k.
        momentum: step -> e_t, cut at 1.
        schedule: step -> the factor of both steps; None: constant.
        outer_schedule: the same of gamma alone, where it is another one.
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
        >>> sustain = SUSTAIN(0.5, 0.3, linear_steps=3)
        >>> round(float(minimize(problem, x0, x0, algorithm=sustain, max_steps=300).x), 1)
        3.0
    """

    inner_step: Step
    outer_step: Step
    linear_step: float | None = None
    linear_steps: int = 10
    seed: int = 0
    momentum: Schedule = Power(2 / 3)
    schedule: Schedule | None = Power(1 / 3)
    outer_schedule: Schedule | None = None
    products: AbstractProducts = field(default_factory=Exact)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, linear_steps=AT_LEAST_1)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step)

    def combination(self) -> SingleLoop:
        eta = number(self.inner_step, self.linear_step)
        return SingleLoop(
            self.inner_step,
            self.outer_step,
            self.linear_step,
            RandomizedNeumann(self.linear_steps, eta, self.seed, self.products),
            Storm(self.momentum),
            self.schedule,
            self.outer_schedule,
        )

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[Any] | None:
        return series_beside(self.loop, self.linear_step, inner_step, outer_step)
