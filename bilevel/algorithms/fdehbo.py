"""The single loop FdeHBO: momentum on all three iterates, and no second derivatives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from bilevel._calculus import AbstractProducts, FiniteDifferences
from bilevel.algorithms.engine.direction import Coupled
from bilevel.algorithms.engine.preset import AbstractPreset
from bilevel.algorithms.engine.recursive import Storm
from bilevel.algorithms.engine.single_loop import Schedule, SingleLoop, Step, demand_steps
from bilevel.algorithms.schedule import Power
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, demand_ranges


@final
@dataclass(frozen=True)
class FdeHBO(AbstractPreset):
    """FdeHBO: d <- D(z; i, j) + (1 - e_t) (d - D(z_old; i, j)), y, v, x moved against d; H v and G v by differences.

    The twin of `SOBA` for operations without a double backward, with the recursive momentum of STORM on all three
    directions; d begins with D at the first point.

    Cost: 10 calls of g and 2 of f for each sample of a batch, first derivatives only. Memory: two points and a
    direction, 3 (2q + p) numbers.

    Converges: |grad Phi|^2 <= e after O(e^-3/2) calls with steps of the order of t^-1/3 and e_t of t^-2/3.

    Source: Yang, Ji, Liang, Xu, "Achieving O(e^-1.5) complexity in Hessian/Jacobian-free stochastic bilevel
    optimization", NeurIPS 2023.

    Args:
        inner_step: rho, of y, or an optimizer.
        outer_step: gamma, of x, or an optimizer.
        linear_step: rho', of v; None: that of y.
        momentum: step -> e_t, cut at 1.
        schedule: step -> the factor of all three steps.
        outer_schedule: the same of gamma alone, where it is another one.
        products: with second derivatives: differences of gradients.
        linear_radius: v is kept at |v| <= this, as the analysis has it; None: it is not.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> round(float(minimize(problem, x0, x0, algorithm=FdeHBO(0.5, 0.2), max_steps=1000).x), 3)
        3.0
    """

    inner_step: Step
    outer_step: Step
    linear_step: float | None = None
    momentum: Schedule = Power(2 / 3)
    schedule: Schedule | None = Power(1 / 3)
    outer_schedule: Schedule | None = None
    products: AbstractProducts = field(default_factory=FiniteDifferences)
    linear_radius: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step)
        demand_ranges(self, linear_radius=POSITIVE)

    def combination(self) -> SingleLoop:
        return SingleLoop(
            self.inner_step,
            self.outer_step,
            self.linear_step,
            Coupled(self.products),
            Storm(self.momentum),
            self.schedule,
            self.outer_schedule,
            self.linear_radius,
        )
