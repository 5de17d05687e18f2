"""Accelerated proximal gradients with adaptive restarts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._inner import Objective, State, unbounded
from bilevel._numerics.rows import row_dots
from bilevel._validate import demand_types
from bilevel.certificates.certificate import Constants
from bilevel.solvers._proximal_steps import AbstractProximalSteps
from bilevel.solvers.proximal_gradient import proximal_bound


@final
@dataclass(frozen=True)
class FISTA(AbstractProximalSteps):
    """y_{k+1} = prox_{t h}(z_k - t grad_y g(x, z_k)), z_{k+1} = y_{k+1} + b_k (y_{k+1} - y_k), b_k = j / (j + 3).

    j counts the steps since the last restart, which is where z_k - y_{k+1}, the generalized gradient, and the step
    y_{k+1} - y_k make an acute angle: the momentum then leads uphill, and is dropped. Converges for convex g and
    0 < t <= 1 / L like 1 / k^2, and with restarts on problems that are strongly convex, also only on the support, about
    like (1 - sqrt(mu / L))^k, without that mu is known.

    The y that is returned is an image of the proximal map, and the residual |y - prox_{t h}(y - t grad_y g)| / t is
    taken there.

    Cost: one gradient and one proximal map a step, and two of each at the end. Memory O(q). Rows of a batch restart
    each on their own. `ITD` differentiates the steps, where the decisions to restart are taken as they are.

    Source: Beck, Teboulle, "A fast iterative shrinkage-thresholding algorithm for linear inverse problems", SIAM J.
    Imaging Sci. 2 (2009); O'Donoghue, Candes, "Adaptive restart for accelerated gradient schemes", Found. Comput. Math.
    15 (2015), the gradient scheme.

    Args:
        step: t; None: 1 / L, as `ProximalGradient` finds it.
        max_steps: at most so many steps.
        tol: stop when the residual is at most this; None or 0: take all the steps.
        min_steps: take at least so many, for `ITD`, which goes on until its derivative is right if this is at least 1.
        settled: go on until the manifold of y has been the same for so many steps; see `ProximalGradient`.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> objective = Objective(
        ...     lambda y: (y - 3).square().sum() / 2, prox=lambda v, t: (v - t).relu()
        ... )
        >>> FISTA(tol=1e-6).solve(objective, torch.zeros(2)).value.round(decimals=4)
        tensor([2., 2.])
    """

    step: float | None = None
    max_steps: int = 1000
    tol: float | None = 1e-8
    min_steps: int = 0
    settled: int = 3

    def __post_init__(self) -> None:
        demand_types(self)
        self.check()

    def with_tolerance(self, tol: float) -> FISTA:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> FISTA:
        return replace(self, max_steps=steps, min_steps=0)

    def with_step(self, step: float) -> FISTA:
        return replace(self, step=step)

    def solution_bound(self, constants: Constants, distance: float) -> float:
        if not self.tol:
            raise unbounded(self, "bounds.gradient_descent")
        return proximal_bound(self, constants, distance)

    def begin(self, y0: Tensor) -> State:
        return y0, y0, torch.zeros_like(y0[..., :1])

    def advance(self, objective: Objective, gradient: Tensor | None, state: State, index: int) -> State:
        assert gradient is not None
        assert self.step is not None
        z, y, count = state
        v = z - self.step * gradient
        new = v if objective.prox is None else objective.prox(v, self.step)
        with torch.no_grad():
            uphill = row_dots(z - new, new - y).unsqueeze(-1) > 0
            count = torch.where(uphill, 0.0, count + 1)
            momentum = count / (count + 3)
        if index == self.max_steps - 1:  # so that the last y is an image of the map
            momentum = torch.zeros_like(momentum)
        return new + momentum * (new - y), new, count

    def moved(self, state: State, new: State) -> Tensor:
        return state[0] - new[1]

    def solution(self, objective: Objective, state: State, gradient: Tensor) -> Tensor:
        assert self.step is not None
        v = state[0] - self.step * gradient
        return v if objective.prox is None else objective.prox(v, self.step)
