"""Broyden's method for y - T(x, y) = 0, in limited memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective, unbounded
from bilevel._numerics.rows import row_dots, safe_row_norms
from bilevel._result import Solved
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, demand_ranges
from bilevel.bounds.iterations import stationary
from bilevel.certificates.certificate import Constants
from bilevel.requirements.properties import Feature
from bilevel.solvers._fixed_points import Safeguard, accelerated, demand_map, image_of

_FAR = 1e8  # times the least residual: the way of Broyden's method to a solution leads over hills
_PATIENCE = 20  # steps without a better one, and the memory
_SMALL = 1e-8  # of |s| |B s|: an update by less would be one of rounding


@final
@dataclass(frozen=True)
class Broyden(AbstractInnerSolver):
    """Broyden's good method: y_{k+1} = y_k + B_k r_k, r = T(x, y) - y, with B_k the last updates of the identity.

    B_{k+1} = B_k + (s - B_k d) s'B_k / (s'B_k d), s = y_{k+1} - y_k and d = r_k - r_{k+1}, so that B_{k+1} d = s. For a
    T that is linear in y of n entries it ends after at most 2 n steps, where so many updates are kept; near y* it
    converges faster than any power, whether T contracts or not, as long as 1 is no eigenvalue of dT/dy.

    Safeguards: as those of `Anderson`, but an iterate is given up only where its residual is 1e8 times the least, since
    the way to the solution of a linear system leads over larger ones. Where the updates are as many as are kept, B
    begins again at the identity.

    Cost: T once a step, and once more at the end, each counted as a gradient. Memory (2 m + 4) q for m updates.
    Rows and tasks side by side are independent.

    Source: Broyden, "A class of methods for solving nonlinear simultaneous equations", Math. Comp. 19 (1965); Gay,
    "Some convergence properties of Broyden's method", SIAM J. Numer. Anal. 16 (1979).

    Args:
        tol: stop when |y - T(x, y)| is at most this.
        rtol: or at most this times |y|, where that is more.
        max_steps: at most so many steps.
        memory: m.

    Raises:
        ValueError: if a number is out of range; from `solve`, if the inner problem is no fixed point.

    Example:
        >>> objective = Objective(lambda y: y.sum(-1), fixed_point=lambda y: 3 - 2 * y)  # expands
        >>> Broyden().solve(objective, torch.zeros(1)).value
        tensor([1.])
    """

    tol: float = 1e-8
    rtol: float = 0.0
    max_steps: int = 500
    memory: int = 50

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, {}, tol=AT_LEAST_0, rtol=AT_LEAST_0, max_steps=AT_LEAST_0, memory=AT_LEAST_1)

    @property
    def heeds(self) -> frozenset[Feature]:
        return frozenset({Feature.fixed_point})

    @property
    def forgets_start(self) -> bool:
        return self.tol > 0 or self.rtol > 0

    @property
    def tolerance(self) -> float | None:
        return self.tol or None

    def with_tolerance(self, tol: float) -> Broyden:
        return replace(self, tol=tol, rtol=0.0)

    def with_steps(self, steps: int) -> Broyden:
        return replace(self, max_steps=steps)

    def solution_bound(self, constants: Constants, distance: float) -> float:
        if not self.tol or self.rtol:
            raise unbounded(self, "bounds.gradient_descent")
        return stationary(constants, self.tol)

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        demand_map("Broyden", objective)
        y = y0.detach().clone()
        guard = Safeguard(y, image_of(objective, y), 1.0, _FAR, _PATIENCE + self.memory)
        return accelerated(objective, guard, _Inverse(y, self.memory), self.tol, self.rtol, self.max_steps)


@final
class _Inverse:
    """B = I + sum_i u_i v_i', for each row of a batch."""

    def __init__(self, like: Tensor, memory: int) -> None:
        self.memory = memory
        self.u = like.new_zeros(*like.shape[:-1], 0, like.shape[-1])
        self.v = self.u.clone()
        self.last: tuple[Tensor, Tensor] | None = None

    def times(self, r: Tensor) -> Tensor:
        """B r."""
        product: Tensor = r + ((self.v @ r.unsqueeze(-1)) * self.u).sum(-2)
        return product

    def told(self, y: Tensor, r: Tensor) -> None:
        """B d = s from now on, of the move s from the last iterate, and the fall d of its residual."""
        before, self.last = self.last, (y, r)
        if before is None:
            return
        s, d = y - before[0], before[1] - r
        if self.u.shape[-2] == self.memory:
            self.u, self.v = self.u[..., :0, :], self.v[..., :0, :]
        left = s + ((self.u @ s.unsqueeze(-1)) * self.v).sum(-2)  # B's
        on = self.times(d)
        size = row_dots(s, on)
        good = (size.abs() > _SMALL * safe_row_norms(s) * safe_row_norms(on)) & size.isfinite() & on.isfinite().all(-1)
        u = torch.where(good.unsqueeze(-1), (s - on) / torch.where(good, size, 1.0).unsqueeze(-1), 0.0)
        v = torch.where(good.unsqueeze(-1), left, 0.0)
        self.u = torch.cat([self.u, u.unsqueeze(-2)], dim=-2)
        self.v = torch.cat([self.v, v.unsqueeze(-2)], dim=-2)

    def next(self, y: Tensor, r: Tensor, damping: Tensor) -> Tensor:
        """y + damping B r."""
        return y + damping * self.times(r)

    def forgotten(self, rows: Tensor, y: Tensor, r: Tensor) -> None:
        """The identity again, in some rows, from y."""
        self.u = torch.where(rows[..., None, None], 0.0, self.u)
        self.v = torch.where(rows[..., None, None], 0.0, self.v)
        assert self.last is not None
        self.last = (
            torch.where(rows.unsqueeze(-1), y, self.last[0]),
            torch.where(rows.unsqueeze(-1), r, self.last[1]),
        )
