"""Anderson acceleration of the map whose fixed point y is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective, unbounded
from bilevel._numerics.mixing import Mixing
from bilevel._result import Solved
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, demand_ranges
from bilevel.bounds.iterations import stationary
from bilevel.certificates.certificate import Constants
from bilevel.requirements.properties import Feature
from bilevel.solvers._fixed_points import Safeguard, accelerated, demand_map, image_of

_FAR = 1e2  # times the least residual
_PATIENCE = 20  # steps without a better one, and twice the memory


@final
@dataclass(frozen=True)
class Anderson(AbstractInnerSolver):
    """Anderson acceleration: y_{k+1} = sum_i a_i [y_i + s (T(x, y_i) - y_i)], over the last iterates, sum_i a_i = 1.

    The weights a make |sum_i a_i (T(x, y_i) - y_i)| least, in a form with a regularization relative to each column, so
    that they stay moderate where the residuals depend on each other. For a T that is linear in y and a memory of its
    size this is `GMRES`: any T converges of which 1 is no eigenvalue, contracting or not. In general it converges near
    such a y* where T contracts, at least as fast as plain iteration does, and mostly elsewhere.

    Safeguards: an iterate whose residual is a hundred times the least, or not finite, is given up for the best one,
    from which the row begins anew, with half the step s; so does a row that has not bettered its best for a while.

    Cost: T once a step, and once more at the end, each counted as a gradient. Memory (2 m + 4) q for m differences.
    Rows and tasks side by side are independent.

    Source: Anderson, "Iterative procedures for nonlinear integral equations", J. ACM 12 (1965); Walker, Ni, "Anderson
    acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49 (2011).

    Args:
        tol: stop when |y - T(x, y)| is at most this.
        rtol: or at most this times |y|, where that is more.
        max_steps: at most so many steps.
        memory: m; 0 is plain iteration.
        damping: s.
        regularization: of the least squares problem, relative to the squared length of each column.

    Raises:
        ValueError: if a number is out of range; from `solve`, if the inner problem is no fixed point.

    Example:
        >>> import torch
        >>> objective = Objective(lambda y: y.sum(-1), fixed_point=lambda y: 3 - 2 * y)  # expands
        >>> Anderson().solve(objective, torch.zeros(1)).value
        tensor([1.])
    """

    tol: float = 1e-8
    rtol: float = 0.0
    max_steps: int = 500
    memory: int = 10
    damping: float = 1.0
    regularization: float = 1e-14

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(
            self,
            {},
            tol=AT_LEAST_0,
            rtol=AT_LEAST_0,
            max_steps=AT_LEAST_0,
            memory=AT_LEAST_0,
            regularization=AT_LEAST_0,
        )
        if not 0 < self.damping <= 1:
            raise ValueError(f"`Anderson(damping=...)` must be in (0, 1]. Got {self.damping}.")

    @property
    def heeds(self) -> frozenset[Feature]:
        return frozenset({Feature.fixed_point})

    @property
    def forgets_start(self) -> bool:
        return self.tol > 0 or self.rtol > 0

    @property
    def tolerance(self) -> float | None:
        return self.tol or None

    def with_tolerance(self, tol: float) -> Anderson:
        return replace(self, tol=tol, rtol=0.0)

    def with_steps(self, steps: int) -> Anderson:
        return replace(self, max_steps=steps)

    def solution_bound(self, constants: Constants, distance: float) -> float:
        if not self.tol or self.rtol:
            raise unbounded(self, "bounds.gradient_descent")
        return stationary(constants, self.tol)

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        demand_map("Anderson", objective)
        y = y0.detach().clone()
        guard = Safeguard(y, image_of(objective, y), self.damping, _FAR, _PATIENCE + 2 * self.memory)
        mixing = Mixing(y, self.memory, self.regularization)
        return accelerated(objective, guard, mixing, self.tol, self.rtol, self.max_steps)
