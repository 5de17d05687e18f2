"""The single loops SRBA and SPABA: recursive differences, and now and then all the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from bilevel._calculus import AbstractProducts, Exact
from bilevel.algorithms.engine.direction import Coupled
from bilevel.algorithms.engine.preset import AbstractPreset
from bilevel.algorithms.engine.recursive import Page, Sarah
from bilevel.algorithms.engine.single_loop import Schedule, SingleLoop, Step, demand_steps
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, POSITIVE, WEIGHT, demand_ranges


@final
@dataclass(frozen=True)
class SRBA(AbstractPreset):
    """SRBA: SOBA along d = D on all the data every `period` steps, else d <- d + D(z; i, j) - D(z_old; i, j).

    The same batches i of g and j of f at both points z = (x, y, v), so that the noise of a difference is of the order
    of the step; constant steps converge to the solution.

    Cost: 6 calls of g and 2 of f for each sample of a batch, and 3n + m every `period` steps. Memory: two points and a
    direction, 3 (2q + p) numbers; none that grows with the data.

    Converges: |grad Phi|^2 <= e after O(sqrt(n + m) / e) calls, the least order that there is for such sums.

    Source: Dagreou, Moreau, Vaiter, Ablin, "A lower bound and a near-optimal algorithm for bilevel empirical risk
    minimization", AISTATS 2024.

    Args:
        inner_step: rho, of y, or an optimizer.
        outer_step: gamma, of x, or an optimizer.
        linear_step: rho', of v; None: that of y.
        period: steps between full evaluations; None: as many as see all samples once.
        schedule: step -> the factor of all three steps; None: constant, as the theory has it.
        outer_schedule: the same of gamma alone, where it is another one.
        products: with second derivatives. With `FiniteDifferences()` it takes first derivatives only, and still
            converges linearly where it does with exact ones, down to the rounding of the differences.
        linear_radius: v is kept at |v| <= this, as the analysis has it; None: it is not.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive or `period` below 1; from `minimize`, if data are batches only.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, FiniteSum, minimize
        >>> a = torch.tensor([2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
        >>> problem = BilevelProblem(
        ...     lambda x, y, a: (y - a).square().mean() / 2,
        ...     lambda x, y, a: (y - a * x).square().mean() / 2,
        ... )
        >>> x0, data = torch.tensor(0.0, dtype=torch.float64), FiniteSum(a, batch_size=1)
        >>> solution = minimize(
        ...     problem, x0, x0, algorithm=SRBA(0.3, 0.02), data=data, max_steps=1500
        ... )
        >>> round(float(solution.x), 6)  # y*(x) = 3.5 x
        1.0
    """

    inner_step: Step
    outer_step: Step
    linear_step: float | None = None
    period: int | None = None
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None
    products: AbstractProducts = field(default_factory=Exact)
    linear_radius: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step)
        demand_ranges(self, period=AT_LEAST_1, linear_radius=POSITIVE)

    def combination(self) -> SingleLoop:
        return SingleLoop(
            self.inner_step,
            self.outer_step,
            self.linear_step,
            Coupled(self.products),
            Sarah(self.period),
            self.schedule,
            self.outer_schedule,
            self.linear_radius,
        )


@final
@dataclass(frozen=True)
class SPABA(AbstractPreset):
    """SPABA: `SRBA` that decides by a coin when to see all the data.

        d = D on all the data with a probability, else d <- d + D(z; i, j) - D(z_old; i, j)

    Cost, memory and order of convergence are those of `SRBA`, in expectation.

    Source: Chu, Xu, Yao, Zhang, "SPABA: a single-loop and probabilistic stochastic bilevel algorithm achieving optimal
    sample complexity", ICML 2024.

    Args:
        inner_step: rho, of y, or an optimizer.
        outer_step: gamma, of x, or an optimizer.
        linear_step: rho', of v; None: that of y.
        probability: of a full evaluation; None: one over the steps that see all samples once.
        seed: of the coin.
        schedule: step -> the factor of all three steps; None: constant.
        outer_schedule: the same of gamma alone, where it is another one.
        products: with second derivatives, as in `SRBA`.
        linear_radius: v is kept at |v| <= this; None: it is not.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive or the probability not in (0, 1]; from `minimize`, if data are batches
            only.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, FiniteSum, minimize
        >>> a = torch.tensor([2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
        >>> problem = BilevelProblem(
        ...     lambda x, y, a: (y - a).square().mean() / 2,
        ...     lambda x, y, a: (y - a * x).square().mean() / 2,
        ... )
        >>> x0, data = torch.tensor(0.0, dtype=torch.float64), FiniteSum(a, batch_size=1)
        >>> solution = minimize(
        ...     problem, x0, x0, algorithm=SPABA(0.3, 0.02), data=data, max_steps=1500
        ... )
        >>> round(float(solution.x), 6)  # y*(x) = 3.5 x
        1.0
    """

    inner_step: Step
    outer_step: Step
    linear_step: float | None = None
    probability: float | None = None
    seed: int = 0
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None
    products: AbstractProducts = field(default_factory=Exact)
    linear_radius: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step)
        demand_ranges(self, probability=WEIGHT, linear_radius=POSITIVE)

    def combination(self) -> SingleLoop:
        return SingleLoop(
            self.inner_step,
            self.outer_step,
            self.linear_step,
            Coupled(self.products),
            Page(self.probability, self.seed),
            self.schedule,
            self.outer_schedule,
            self.linear_radius,
        )
