"""The single loop MA-SOBA: SOBA whose outer direction is a moving average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

from bilevel._calculus import AbstractProducts, Exact
from bilevel.algorithms.engine.direction import Coupled
from bilevel.algorithms.engine.preset import AbstractPreset
from bilevel.algorithms.engine.reduction import MovingAverage
from bilevel.algorithms.engine.single_loop import Schedule, SingleLoop, Step, demand_steps
from bilevel.arguments.fits import demand_types


@final
@dataclass(frozen=True)
class MASOBA(AbstractPreset):
    """MA-SOBA: y and v as `SOBA`, h <- (1 - theta) h + theta D_x, x <- P(x - gamma h); h begins with the first D_x.

    theta = 1 is `SOBA`. The average makes the outer direction less noisy where x is stepped by an optimizer that
    divides by the size of what it is given (`Adam`), as it is for networks.

    Cost: that of `SOBA`, and p numbers.

    Converges: for g strongly convex in y, with rho, gamma and theta of the order of T^-1/2, the least E |grad Phi|^2 of
    T steps is O(T^-1/2).

    Source: Chen, Xiao, Balasubramanian, "Optimal algorithms for stochastic bilevel optimization under relaxed
    smoothness conditions", JMLR 25 (2024).

    Args:
        inner_step: rho, of y, or an optimizer.
        outer_step: gamma, of x, or an optimizer.
        linear_step: rho', of v; None: that of y.
        theta: of the average, in (0, 1], or step -> theta.
        schedule: step -> the factor of all three steps; None: constant.
        outer_schedule: the same of gamma alone, where it is another one.
        products: with second derivatives; `FiniteDifferences()` where operations have no double backward.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive, or theta is not in (0, 1].

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> round(float(minimize(problem, x0, x0, algorithm=MASOBA(0.5, 0.05), max_steps=600).x), 4)
        3.0
    """

    inner_step: Step
    outer_step: Step
    linear_step: float | None = None
    theta: float | Callable[[int], float] = 0.1
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None
    products: AbstractProducts = field(default_factory=Exact)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step)
        if not callable(self.theta) and not 0 < self.theta <= 1:
            raise ValueError(f"`MASOBA(theta=...)` must be in (0, 1], or a function step -> theta. Got {self.theta}.")

    def combination(self) -> SingleLoop:
        theta = self.theta
        return SingleLoop(
            self.inner_step,
            self.outer_step,
            self.linear_step,
            Coupled(self.products),
            MovingAverage(theta if callable(theta) else _Constant(theta)),
            self.schedule,
            self.outer_schedule,
        )


@final
@dataclass(frozen=True)
class _Constant:
    """step -> the same number."""

    number: float

    def __call__(self, step: int) -> float:
        return self.number
