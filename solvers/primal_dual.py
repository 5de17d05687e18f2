"""The primal-dual method of Chambolle, Pock and Condat."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._inner import Objective, State
from bilevel._validate import demand_types
from bilevel.arguments.ranges import SIZE, demand_ranges
from bilevel.inner_problems.flat_image import FlatImage
from bilevel.solvers._proximal_steps import AbstractProximalSteps


@final
@dataclass(frozen=True)
class PrimalDual(AbstractProximalSteps):
    """u_{k+1} = prox_{s h*}(u_k + s (2 y_k - y_{k-1})), y_{k+1} = y_k - t (grad_y g(x, y_k) + u_{k+1}), s = 1 / (2 t).

    u tends to an element of the subdifferential of h. The map of the conjugate at p is p - s z by that of h itself,
    z = prox_{h / s}(p / s) (Moreau), and z is the y that is returned: what the map sets to zero is zero. Converges for
    convex g where 1 / t - s >= L / 2, so for t <= 1 / L.

    Of a term k(A y + b) (`Affine` with a matrix) it takes k and A apart, with A'u in the place of u,

        u_{k+1} = prox_{s k*}(u_k + s (A (2 y_k - y_{k-1}) + b)),  y_{k+1} = y_k - t (grad_y g + A'u_{k+1}),

    s = 1 / (2 t |A|^2): maps of k alone, and no system to solve. The y that is returned is the image of the last one
    under the map of the whole term.

    With h(y) it is no faster than `ProximalGradient`, and much slower than `FISTA`; it is
    here for what it converges to, a pair (y, u), and since `ITD` differentiates its steps.

    Cost: one gradient and one proximal map a step, and two of each at the end. Memory O(q).

    Source: Condat, "A primal-dual splitting method for convex optimization involving Lipschitzian, proximable and
    linear composite terms", J. Optim. Theory Appl. 158 (2013), algorithm 3.2; Chambolle, Pock, "A
    first-order primal-dual algorithm for convex problems with applications to imaging", J. Math. Imaging Vis. 40
    (2011).

    Args:
        step: t; None: 1 / L, as `ProximalGradient` finds it.
        max_steps: at most so many steps.
        tol: stop when the residual |z - prox_{t h}(z - t grad_y g)| / t is at most this; None or 0: take all the steps.
        min_steps: take at least so many, for `ITD`, which goes on until its derivative is right if this is at least 1.
        settled: go on until the manifold of y has been the same for so many steps; see `ProximalGradient`.
        rows: how many entries u has; None: as many as y, or as A has rows, which is found at run time.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> objective = Objective(
        ...     lambda y: (y - 3).square().sum() / 2, prox=lambda v, t: (v - t).relu()
        ... )
        >>> PrimalDual(tol=1e-6).solve(objective, torch.zeros(2)).value.round(decimals=4)
        tensor([2., 2.])
    """

    step: float | None = None
    max_steps: int = 1000
    tol: float | None = 1e-8
    min_steps: int = 0
    settled: int = 3
    rows: int | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        self.check()
        demand_ranges(self, rows=SIZE)

    def with_tolerance(self, tol: float) -> PrimalDual:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> PrimalDual:
        return replace(self, max_steps=steps, min_steps=0)

    def with_step(self, step: float) -> PrimalDual:
        return replace(self, step=step)

    def shaped(self, objective: Objective) -> PrimalDual:
        return self if objective.image is None else replace(self, rows=objective.image.b.shape[-1])

    def begin(self, y0: Tensor) -> State:
        u = torch.zeros_like(y0) if self.rows is None else y0.new_zeros(*y0.shape[:-1], self.rows)
        return y0, y0, u, y0

    def advance(self, objective: Objective, gradient: Tensor | None, state: State, index: int) -> State:
        assert gradient is not None
        assert self.step is not None
        (y, ahead, u, _), s = state, 0.5 / self.step
        if objective.image is not None:
            return self._of_image(objective.image, gradient, state)
        p = u / s + ahead
        z = p if objective.prox is None else objective.prox(p, 1 / s)
        u = s * (p - z)
        new = y - self.step * (gradient + u)
        return (z if index == self.max_steps - 1 else new), 2 * new - y, u, z

    def _of_image(self, image: FlatImage, gradient: Tensor, state: State) -> State:
        """The same for k(A y + b); the last of the state is y less what A y + b - z is in units of y."""
        assert self.step is not None
        y, ahead, u, _ = state
        s = 0.5 / (self.step * image.squared_norm)
        p = u / s + image.image(ahead)
        z = image.prox(p, 1 / s)
        u = s * (p - z)
        new = y - self.step * (gradient + image.back(u))
        off = image.back(image.image(new) - z) / image.squared_norm
        return new, 2 * new - y, u, new - off

    def moved(self, state: State, new: State) -> Tensor:
        return torch.hypot(state[0] - new[0], new[0] - new[3])

    def solution(self, objective: Objective, state: State, gradient: Tensor) -> Tensor:
        if objective.image is None or objective.prox is None:
            return state[3]
        assert self.step is not None
        return objective.prox(state[0] - self.step * gradient, self.step)
