"""The proximal gradient method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from bilevel._inner import Objective, State
from bilevel._validate import demand_types
from bilevel.bounds.iterations import gradient_descent, stationary
from bilevel.certificates.certificate import Constants
from bilevel.solvers._proximal_steps import AbstractProximalSteps


@final
@dataclass(frozen=True)
class ProximalGradient(AbstractProximalSteps):
    """y_{k+1} = prox_{t h}(y_k - t grad_y g(x, y_k)): gradient descent on g, then the proximal map of h.

    Converges for convex g and 0 < t < 2 / L, L the largest curvature of g, like (1 - mu t)^k where g is strongly
    convex. The residual is |y_{k+1} - y_k| / t, the length of the generalized gradient; y is the last prox, so that
    entries which the map sets to zero are exactly zero. Without a non-smooth term it is gradient descent. `FISTA` takes
    fewer steps.

    Cost: one gradient and one proximal map a step, and one of each for the residual. Memory O(q). `ITD` differentiates
    its steps, through the map as well.

    Source: Beck, Teboulle, "A fast iterative shrinkage-thresholding algorithm for linear inverse problems", SIAM J.
    Imaging Sci. 2 (2009), section 1.

    Args:
        step: t; None: 1 / L, from an upper estimate of the curvature at y0, by some 10 to 20 Hessian products; and
            where that fails, from the largest curvature on the way, as `Iterate` finds it.
        max_steps: at most so many steps.
        tol: stop when the residual is at most this; None or 0: take all the steps.
        min_steps: take at least so many, for `ITD`, which goes on until its derivative is right if this is at least 1.
        settled: go on until the manifold of y, such as its support, has been the same for so many steps after the
            residual has met `tol`, where the term says what it is on. A residual of zero needs no more steps.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import torch
        >>> prox = lambda v, t: (v - t).relu()  # of h = y where y >= 0
        >>> objective = Objective(lambda y: (y - 3).square().sum() / 2, prox=prox)
        >>> ProximalGradient(step=1.0, tol=1e-6).solve(objective, torch.zeros(2)).value
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

    def with_tolerance(self, tol: float) -> ProximalGradient:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> ProximalGradient:
        return replace(self, max_steps=steps, min_steps=0)

    def with_step(self, step: float) -> ProximalGradient:
        return replace(self, step=step)

    def solution_bound(self, constants: Constants, distance: float) -> float:
        return proximal_bound(self, constants, distance)

    def begin(self, y0: Tensor) -> State:
        return (y0,)

    def advance(self, objective: Objective, gradient: Tensor | None, state: State, index: int) -> State:
        assert gradient is not None
        assert self.step is not None
        v = state[0] - self.step * gradient
        return (v if objective.prox is None else objective.prox(v, self.step),)

    def solution(self, objective: Objective, state: State, gradient: Tensor) -> Tensor:
        return state[0]


def proximal_bound(solver: AbstractProximalSteps, constants: Constants, distance: float) -> float:
    """|y - y*| where proximal steps end: by their tolerance (`stationary`), or after N steps of `ProximalGradient`.

    What `error_bound` makes of it for a hypergradient holds where y has the support of y*, with C_G a bound on all of
    dF/dx.

    A proximal map does not expand, so that steps contract as those of gradient descent do. With the residual r =
    |y - T(y)| / t of a step t <= 1 / L, |y - y*| <= (1 / mu) r: T contracts by 1 - mu t, and |y - T(y)| >=
    mu t |y - y*|.

    Raises:
        ValueError: if the step is derived at run time, or mu is unknown.
    """
    if solver.step is None:
        raise ValueError(
            f"`{type(solver).__name__}(step=None)` derives its step at run time. Give `step=`, at most 1 / L."
        )
    if solver.tol:
        L, mu = constants.L, constants.mu
        if L is None or mu is None or solver.step * (L + mu) > 2:  # beyond it T contracts by less than 1 - mu t
            raise ValueError(
                f"no bound is known for a step of {solver.step:g}: it must be at most 2 / (L + mu), both of them given."
                f" Got L = {L} and mu = {mu}."
            )
        return stationary(constants, solver.tol)
    return gradient_descent(constants, step=solver.step, steps=solver.max_steps, distance=distance)
