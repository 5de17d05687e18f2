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
from bilevel.inner_problems.margins import default_margin
from bilevel.inner_problems.polytope import FlatPolytope, padded
from bilevel.inner_problems.qualification import independence, second_order, widths

if TYPE_CHECKING:  # a floor of imports less
    from bilevel.inner_problems.activity import Activity
    from bilevel.inner_problems.multipliers import Multipliers

_DENSE = 2000  # unknowns up to which definiteness is measured by a factorization; beyond, products are all there is


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

    @property
    def force(self) -> Tensor:
        """grad_y g + A' nu, with the forces of slacks after those of y: zero on the free entries `(*batch, n)`."""
        y = self.moving.with_slacks(self.y)
        pull = matrix_times(self.moving.A.detach().mT, self.activity.multipliers)
        return padded(self.at.gradient, y) + pull

    def drift(self, s: Tensor, t: Tensor, bounded: Tensor) -> Tensor:
        """d/dx [s'E(x, y) + t'(y - bound)], summed over the batch: `(p,)`; of the nearer bound, where there is one."""
        if not self.moves:
            return torch.zeros_like(self.x)
        A_x, b, lower, upper = self.moving.tensors()
        y = FlatPolytope(*(part.detach() for part in self.moving.tensors())).with_slacks(self.y)
        bound = torch.where(bounded, torch.where(self.activity.upper, upper, lower), y)
        return self._in_x((s * (matrix_times(A_x, y) - b)).sum() + (t * (y - bound)).sum())

    def _in_x(self, total: Tensor) -> Tensor:
        if not total.requires_grad:
            return torch.zeros_like(self.x)
        (found,) = torch.autograd.grad(total, self.x, retain_graph=True, allow_unused=True, materialize_grads=True)
        return found

    def turned(self, u: Tensor) -> Tensor:
        """d/dx of nu'A u, summed over the batch: `(p,)`."""
        if not self.moves:
            return torch.zeros_like(self.x)
        return self._in_x((self.activity.multipliers * matrix_times(self.moving.A, u)).sum())

    def linearization(self, reports: tuple[Report, ...], multipliers: Multipliers | None = None) -> Linearization:
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
            own = on[..., :q]
            if n > q and not bool(own.any()):  # a slack alone, of which H knows nothing
                return inside(u, curved(torch.zeros_like(own), on))
            return inside(u, curved(at.operator.mv(own), on))

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
            return self.turned(u) + self.drift(s, t, ~free)

        def right_hand_side(fy: Tensor) -> Tensor:
            return torch.cat([padded(fy, y) * free, fy.new_zeros(*fy.shape[:-1], m)], dim=-1)

        def apart(w: Tensor) -> Tensor:
            return self.drift(w, -matrix_times(A.mT, w) * ~free, ~free)

        least = default_margin(y)
        independent = independence(A, free, apart if self.moves else None, least)
        blocks = SaddleBlocks(LinearOperator(leading, n), A_F, free, n - q)
        return Linearization(
            self.y,
            at.gradient,
            mv,
            products,
            pull,
            operator=LinearOperator(mv, n + m, blocks=blocks),
            right_hand_side=right_hand_side,
            moved=moved,
            reports=(*reports, independent, *widths(moving.lower, moving.upper, self._in_x)),
            multipliers=multipliers,
            second_order=None if n > _DENSE else lambda: second_order(blocks, y),
            unreduced=lambda: unreduced(self),
        )


def unreduced(at: Optimality) -> Linearization:
    """The whole system of the optimality conditions, without an active set: for checks, as it is ill-conditioned.

    With the distances d and the multipliers z of all bounds, and J the rows of the bounds, signed,

        F = (grad_y L + J' z, E, z d),  dF/d(y, nu, z) = [[L_yy, A', J'], [A, 0, 0], [z J, 0, -d]],

    which is not symmetric. A strictly complementary entry has one of z and d equal to zero, and the same solution.
    """
    polytope = FlatPolytope(*(part.detach() for part in at.moving.tensors()))
    y, bend = polytope.with_slacks(at.y), at.bend
    A = polytope.A.expand(*y.shape[:-1], *polytope.A.shape[-2:])
    (m, n), q = A.shape[-2:], at.y.shape[-1]
    sign = torch.where(at.activity.upper, 1.0, -1.0).to(y)  # of the nearer bound, the only one that may hold
    bound = torch.where(at.activity.upper, polytope.upper, polytope.lower)
    bounded = bound.isfinite()
    distance = torch.where(bounded, (sign * (bound - y)).clamp_min(0), 1.0)
    z = torch.where(bounded, (-sign * at.force).clamp_min(0), 0.0)
    z = torch.where(polytope.fixed, 1.0, z)  # these hold whatever their multipliers are

    def curved(u: Tensor) -> Tensor:
        hu = at.at.operator.mv(u[..., :q])
        return padded(hu if bend is None else hu + bend(u[..., :q]), u)

    def split(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return v[..., :n], v[..., n : n + m], v[..., n + m :]

    def mv(v: Tensor) -> Tensor:  # the transpose, which is what the adjoint system has
        u, s, w = split(v)
        top = curved(u) + matrix_times(A.mT, s) + sign * z * w
        return torch.cat([top, matrix_times(A, u), sign * u - distance * w], -1)

    def transposed(v: Tensor) -> Tensor:
        u, s, w = split(v)
        top = curved(u) + matrix_times(A.mT, s) + sign * w
        return torch.cat([top, matrix_times(A, u), sign * z * u - distance * w], -1)

    def products(v: Tensor) -> tuple[Tensor, Tensor | None]:
        return mv(v), at.at.cross(v[..., :q])

    def moved(v: Tensor, _: Tensor) -> Tensor:
        u, s, w = split(v)
        return at.turned(u) + at.drift(s, sign * z * w, bounded)

    def right_hand_side(fy: Tensor) -> Tensor:
        return torch.cat([padded(fy, y), fy.new_zeros(*fy.shape[:-1], m + n)], -1)

    operator = LinearOperator(mv, n + m + n, symmetric=False, transposed_mv=transposed)
    return Linearization(
        at.y,
        at.at.gradient,
        mv,
        products,
        operator=operator,
        right_hand_side=right_hand_side,
        moved=moved,
    )
