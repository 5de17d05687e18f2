"""The single loop SOBA: inner, linear and outer iterates move together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from bilevel._calculus import AbstractProducts, Exact
from bilevel.algorithms.engine.direction import Coupled
from bilevel.algorithms.engine.preset import AbstractPreset
from bilevel.algorithms.engine.single_loop import Schedule, SingleLoop, Step, demand_steps
from bilevel.arguments.fits import demand_types


@final
@dataclass(frozen=True)
class SOBA(AbstractPreset):
    """SOBA: y <- y - rho d_y, v <- v - rho' d_v, x <- P(x - gamma d_x), all three at once.

        d_y = grad_y g,   d_v = H v - grad_y f,   d_x = grad_x f - G v,   all at the same (x, y, v)

    with H = d2g/dy2 and G = d2g/dxdy on one batch of g, and f on one of its own. The three are zero at the same time
    where y = y*(x), v = H^-1 grad_y f and grad Phi(x) = 0, and only there; their norm |(d_y, d_v, d_x)| is what `tol`
    is compared with (d_x alone may vanish at the start, where v is zero), with the projection's residual for d_x where
    x is constrained. `Record.grad_norm` is that norm.

    Cost: a step takes one gradient of g with its graph, one backward pass through it for H v and G v together, and one
    gradient of f. Memory: that of a gradient, and 3 q. Nothing is solved at the start: v begins at zero.

    Converges: for g strongly convex in y, with steps of t^-2/5 (rho) and t^-3/5 (gamma) the least E |grad Phi|^2 of T
    steps is O(T^-2/5). With constant steps and the whole data it converges where gamma is small against rho: the inner
    and the linear iterate must follow x. Constant steps and batches leave noise of the order of the steps.

    Source: Dagreou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables stochastic and global
    variance reduction algorithms", NeurIPS 2022, algorithm 1 (their v has the other sign).

    Args:
        inner_step: rho, of y; at most 2 / L with L the largest eigenvalue of H.
        outer_step: gamma, of x.
        linear_step: rho', of v; None: that of y.
        schedule: step -> factor of all three, such as `Power()`; None: constant steps.
        outer_schedule: the same of gamma alone, where it is another one.
        products: with second derivatives; `FiniteDifferences()` where operations have no double backward.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive; from `minimize`, if y is constrained or no minimizer of g.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> solution = minimize(
        ...     problem, x0, x0, algorithm=SOBA(inner_step=0.5, outer_step=0.1), max_steps=300
        ... )
        >>> round(float(solution.x), 4), solution.stats.hvps
        (3.0, 301)
    """

    inner_step: Step
    outer_step: Step
    linear_step: float | None = None
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None
    products: AbstractProducts = field(default_factory=Exact)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step)

    def combination(self) -> SingleLoop:
        return SingleLoop(
            self.inner_step,
            self.outer_step,
            self.linear_step,
            Coupled(self.products),
            schedule=self.schedule,
            outer_schedule=self.outer_schedule,
        )
