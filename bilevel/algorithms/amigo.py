"""AmIGO: inner and linear steps in turns, both from where they were."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from bilevel._calculus import AbstractProducts, Exact
from bilevel.algorithms.engine.direction import Coupled
from bilevel.algorithms.engine.preset import AbstractPreset
from bilevel.algorithms.engine.steps import Schedule, Step, demand_steps
from bilevel.algorithms.engine.turns import Turns
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, demand_ranges


@final
@dataclass(frozen=True)
class AmIGO(AbstractPreset):
    """AmIGO: T steps of y, N steps of v at the new y, one of x; y and v go on from where they were.

        T times  y <- y - rho_t grad_y g;      N times  v <- v - rho'_t (H v - grad_y f);
        x <- P(x - gamma_t (grad_x f - G v))

    Each step of y and of v has a batch of g of its own, G one more; the batch of f is one for all. As v goes on, there
    is no bias of a series that is cut off, as `StocBiO` has at the same cost: of the two it is to be preferred.

    Cost: (T + N + 2) calls for each sample of a batch. Memory: v, the graph of one gradient.

    Converges: for g strongly convex in y with T and N of the order of the condition number, and batches that grow, at
    the rate of gradient descent on Phi; with batches of one size to noise of the order of the steps.

    Source: Arbel, Mairal, "Amortized implicit differentiation for stochastic bilevel optimization", ICLR 2022.

    Args:
        inner_step: rho, of y, or an optimizer.
        outer_step: gamma, of x, or an optimizer.
        linear_step: rho', of v; None: that of y.
        inner_steps: T.
        linear_steps: N.
        schedule: step -> the factor of all three steps; None: constant.
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
        >>> amigo = AmIGO(0.5, 0.5, inner_steps=2, linear_steps=2)
        >>> round(float(minimize(problem, x0, x0, algorithm=amigo, max_steps=100).x), 6)
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
            self.linear_step,
            self.inner_steps,
            self.linear_steps,
            Coupled(self.products),
            schedule=self.schedule,
            outer_schedule=self.outer_schedule,
        )
