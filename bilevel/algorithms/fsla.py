"""FSLA: one step of y, one of v, one of x, in turns, with a recursive momentum of x."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from bilevel._calculus import AbstractProducts, Exact
from bilevel.algorithms.engine.direction import Coupled
from bilevel.algorithms.engine.preset import AbstractPreset
from bilevel.algorithms.engine.recursive import Storm
from bilevel.algorithms.engine.steps import Schedule, Step, demand_steps
from bilevel.algorithms.engine.turns import Turns
from bilevel.algorithms.schedule import Power
from bilevel.arguments.fits import demand_types


@final
@dataclass(frozen=True)
class FSLA(AbstractPreset):
    """FSLA: y, then v at the new y, then x along d, a recursive momentum, each on batches of its own.

        y <- y - rho_t grad_y g(i1);   v <- v - rho'_t (H(i2) v - grad_y f(j2));
        d <- D_x(z; i3, j3) + (1 - e_t) (d - D_x(z_old; i3, j3));   x <- P(x - gamma_t d)

    with D_x = grad_x f - G v at the new z = (x, y, v) and at that of the step before; d begins with D_x.

    Cost: 5 calls of g or products with its second derivatives and 2 of f for each sample of a batch, 7 in all, in five
    backward passes. Memory: v, a point and a direction. `SOBA` makes more of as many calls on every benchmark here.

    Converges: the least E |grad Phi|^2 of T steps is O(T^-1/2) with steps and e_t of the order of t^-1/2.

    Source: Li, Gu, Huang, "A fully single loop algorithm for bilevel optimization without Hessian inverse", AAAI 2022.

    Args:
        inner_step: rho, of y, or an optimizer.
        outer_step: gamma, of x, or an optimizer.
        linear_step: rho', of v; None: that of y.
        momentum: step -> e_t, cut at 1.
        schedule: step -> the factor of all three steps; None: constant.
        outer_schedule: the same of gamma alone, where it is another one.
        products: with second derivatives; `FiniteDifferences()` where operations have no double backward.

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
        >>> fsla = FSLA(0.5, 0.2, schedule=None)
        >>> round(float(minimize(problem, x0, x0, algorithm=fsla, max_steps=100).x), 3)
        3.0
    """

    inner_step: Step
    outer_step: Step
    linear_step: float | None = None
    momentum: Schedule = Power(1 / 2)
    schedule: Schedule | None = Power(1 / 2)
    outer_schedule: Schedule | None = None
    products: AbstractProducts = field(default_factory=Exact)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step)

    def combination(self) -> Turns:
        return Turns(
            self.inner_step,
            self.outer_step,
            self.linear_step,
            direction=Coupled(self.products),
            reduction=Storm(self.momentum),
            schedule=self.schedule,
            outer_schedule=self.outer_schedule,
            apart=True,
        )
