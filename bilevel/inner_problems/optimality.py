"""Optimality conditions under constraints to first order, on the entries and constraints that are not held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from bilevel._calculus import Linearization
from bilevel._linear import LinearOperator, SaddleBlocks
from bilevel._numerics.rows import matrix_times
from bilevel._result import Report
from bilevel.inner_problems.polytope import FlatPolytope, padded

if TYPE_CHECKING:  # a floor of imports less
    from bilevel.inner_problems.activity import Activity


@final
@dataclass(frozen=True, eq=False)
class Optimality:
    """grad_y g + A' nu + (bounds' forces) = 0, E(x, y) = 0, on the active set, to first order; A = dE/dy.

    Entries are those of y and, after them, slacks of inequalities. With F the entries that no bound holds, u = 0 off F,
    L = g + nu'E the Lagrangian, and b = (grad_F f, 0):

        (dF/dy)' = [[L_FF, A_F'], [A_F, 0]],  (dF/dx)'(u, s) = d2g/dxdy u + d/dx [nu'A u + s'E + t'(y - bound)],

    t = grad_y f - L_yy u - A's on the held entries.

    Attributes:
        y: `(*batch, q)`.
        at: g to first order there.
        x: a leaf `(p,)` that `moving` has its graph from.
        moving: the constraints as a polytope, linear ones as they are, others by their tangents at y.
        activity: which bounds hold.
        bend: u `(*batch, q)` -> the second derivative of nu'E times u; None: E is affine in y.
    """

    y: Tensor
    at: Linearization
    x: Tensor
    moving: FlatPolytope
    activity: Activity
    bend: Callable[[Tensor], Tensor] | None = None

    @property
    def moves(self) -> bool:
        """Whether the constraints depend on x."""
        return any(part.requires_grad for part in self.moving.tensors())

    def linearization(self, reports: tuple[Report, ...]) -> Linearization:
        """The system of the active set, its right-hand side, and how it moves with x."""
        at, moving, free, bend = self.at, self.moving, self.activity.free, self.bend
        polytope = FlatPolytope(*(part.detach() for part in moving.tensors()))
        y = polytope.with_slacks(self.y)
        A = polytope.A.expand(*y.shape[:-1], *polytope.A.shape[-2:])
        A_F, (m, n), q = A * free.unsqueeze(-2), A.shape[-2:], self.y.shape[-1]
        seen: list[tuple[Tensor, int, Tensor]] = []  # the latest (u, s), and the curvature times u there

        def curved(hu: Tensor, u: Tensor) -> Tensor:
            return padded(hu if bend is None else hu + bend(u[..., :q]), u)

        def inside(u: Tensor, hu: Tensor) -> Tensor:
            return torch.where(free, hu, u)  # the identity where a bound holds

        def products(v: Tensor) -> tuple[Tensor, Tensor | None]:
            u, s = torch.where(free, v[..., :n], 0.0), v[..., n:]
            hu, gu = at.products(u[..., :q])
            hu = curved(hu, u)
            seen[:] = [(v, v._version, hu)]
            top = inside(v[..., :n], hu) + matrix_times(A_F.mT, s)
            return torch.cat([top, matrix_times(A_F, u)], dim=-1), gu

        def leading(u: Tensor) -> Tensor:
            on = torch.where(free, u, 0.0)
            return inside(u, curved(at.operator.mv(on[..., :q]), on))

        def mv(v: Tensor) -> Tensor:
            top = leading(v[..., :n]) + matrix_times(A_F.mT, v[..., n:])
            return torch.cat([top, matrix_times(A_F, v[..., :n])], dim=-1)

        def pull(v: Tensor) -> Tensor | None:
            return at.cross(torch.where(free, v[..., :n], 0.0)[..., :q])

        def moved(v: Tensor, fy: Tensor) -> Tensor:
            if not self.moves:
                return torch.zeros_like(self.x)
            u, s = torch.where(free, v[..., :n], 0.0), v[..., n:]
            known = bool(seen) and seen[0][0] is v and seen[0][1] == v._version
            hu = seen[0][2] if known else curved(at.operator.mv(u[..., :q]), u)
            t = (padded(fy, u) - hu - matrix_times(A.mT, s)) * ~free
            A_x, b, lower, upper = moving.tensors()
            bound = torch.where(free, y, torch.where(self.activity.upper, upper, lower))
            total = (self.activity.multipliers * matrix_times(A_x, u)).sum() + (s * (matrix_times(A_x, y) - b)).sum()
            total = total + (t * (y - bound)).sum()
            found: Tensor = torch.autograd.grad(
                total, self.x, retain_graph=True, allow_unused=True, materialize_grads=True
            )[0]
            return found

        def right_hand_side(fy: Tensor) -> Tensor:
            return torch.cat([padded(fy, y) * free, fy.new_zeros(*fy.shape[:-1], m)], dim=-1)

        blocks = SaddleBlocks(LinearOperator(leading, n), A_F, free)
        return Linearization(
            self.y,
            at.gradient,
            mv,
            products,
            pull,
            operator=LinearOperator(mv, n + m, blocks=blocks),
            right_hand_side=right_hand_side,
            moved=moved,
            reports=reports,
        )
