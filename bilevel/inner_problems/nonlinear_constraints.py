"""Nonlinear constraints on y at a fixed x, in vectors: what inner solvers read of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import grad
from bilevel._linear import LinearOperator
from bilevel._numerics.rows import matrix_times
from bilevel._numerics.sparse_rows import SparseRows
from bilevel.inner_problems.polytope import FlatPolytope, lengths
from bilevel.portable.pickling import AbstractPortable
from bilevel.requirements.properties import DoesNotApply

_BENT = 1e-6  # relative to their size: more is no rounding


@final
@dataclass(frozen=True, eq=False)
class Tangents:
    """Constraints at a point to second order.

    Attributes:
        y: the point, a leaf `(*batch, q)`.
        c: the inequalities there `(*batch, k)`, at most zero where they hold.
        C: their gradients `(*batch, k, q)`; with a graph from y, and from x if that has one.
        e: the equalities there `(*batch, m)`.
        E: their gradients `(*batch, m, q)`.
    """

    y: Tensor
    c: Tensor
    C: Tensor
    e: Tensor
    E: Tensor

    def curvature(self, z: Tensor, nu: Tensor) -> LinearOperator:
        """sum_i z_i d2c_i/dy2 + sum_j nu_j d2e_j/dy2, for multipliers `(*batch, k)` and `(*batch, m)`; not counted."""
        with torch.enable_grad():
            pull = matrix_times(self.C.mT, z.detach()) + matrix_times(self.E.mT, nu.detach())

        def mv(v: Tensor) -> Tensor:
            if not pull.requires_grad:
                return torch.zeros_like(v)
            (found,) = torch.autograd.grad(pull, self.y, v, retain_graph=True, allow_unused=True)
            return torch.zeros_like(v) if found is None else found

        return LinearOperator(mv, self.y.shape[-1])


@final
@dataclass(frozen=True, eq=False)
class FlatConstraints(AbstractPortable):
    """c(x, y) <= 0 and e(x, y) = 0 at a fixed x, as functions of vectors y `(*batch, q)`: `Objective.nonlinear`.

    Linear constraints stand beside them in `Objective.constraints`, where there are any. The Hessian of the Lagrangian
    g + z'c + nu'e is that of `Objective.hessian(y)` plus `tangents(y).curvature(z, nu)`.

    Attributes:
        inequalities: y -> c `(*batch, k)`, differentiable; k may be 0.
        equalities: y -> e `(*batch, m)`, likewise.
        sparse: (G, A), where c is G y - h and e is A y - b with sparse matrices, for solvers that factor them; else
            None.
    """

    inequalities: Callable[[Tensor], Tensor]
    equalities: Callable[[Tensor], Tensor]
    sparse: tuple[SparseRows, SparseRows] | None = None

    def values(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """c and e at y, without a graph."""
        with torch.no_grad():
            return self.inequalities(y), self.equalities(y)

    def pulled(self, y: Tensor, z: Tensor, nu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c and e at y, and the gradient of z'c + nu'e: one backward pass, without a graph."""
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            c, e = self.inequalities(leaf), self.equalities(leaf)
            total = (z.detach() * c).sum() + (nu.detach() * e).sum()
        return c.detach(), e.detach(), grad(total, leaf)

    def tangents(self, y: Tensor) -> Tangents:
        """The constraints at y with their gradients; a backward pass for each of them."""
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            c, e = self.inequalities(leaf), self.equalities(leaf)
            return Tangents(leaf, c, _rows(c, leaf), e, _rows(e, leaf))


def tangent(linear: FlatPolytope | None, at: Tangents) -> FlatPolytope:
    """Linear constraints, and the tangents of others at a point; rows: equalities first, then inequalities with slacks.

    Among equalities and among inequalities, the linear ones come first. Differentiable in what its parts are.
    """
    y, q = at.y.detach(), at.y.shape[-1]
    batch = y.shape[:-1]
    b, h = matrix_times(at.E, y) - at.e, matrix_times(at.C, y) - at.c
    if linear is None:
        unbounded = torch.full_like(y, torch.inf)
        return FlatPolytope.lifted(at.E, b, -unbounded, unbounded, at.C, h)
    A, b0, lower, upper, G, h0 = (
        part.expand(*batch, *part.shape[part.dim() - axes :])
        for part, axes in zip(linear.natural(q), (2, 1, 1, 1, 2, 1), strict=True)
    )
    return FlatPolytope.lifted(
        torch.cat([A, at.E], -2),
        torch.cat([b0, b], -1),
        lower,
        upper,
        torch.cat([G, at.C], -2),
        torch.cat([h0, h], -1),
    )


def demand_affine(constraints: FlatConstraints, y: Tensor) -> None:
    """Refuse equalities that are bent: e at a mean of points is the mean of their e, where they are affine."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    noise = torch.randn(y.shape[-1], generator=generator, dtype=torch.float64, device="cpu").to(y)
    step = (1 + y.abs().amax(-1, keepdim=True)) * noise
    with torch.no_grad():
        here, there, middle = (constraints.equalities(y + t * step) for t in (0.0, 1.0, 0.5))
    size = torch.stack([here.abs(), there.abs(), middle.abs()]).amax()
    bent = (middle - (here + there) / 2).abs().amax()
    if bool(bent > max(_BENT, 1e2 * torch.finfo(y.dtype).eps) * size):
        raise DoesNotApply(
            "the equalities are not affine in y, so that the feasible set is not convex and y* need not be what"
            " the optimality conditions find. Write e(x, y) = 0 with e affine in y, or, where it is convex and"
            " holds anyhow, as `inequalities=`."
        )


def _rows(values: Tensor, leaf: Tensor) -> Tensor:
    """The gradients of the entries of values `(*batch, k)` in a leaf `(*batch, q)`: `(*batch, k, q)`, with a graph."""
    found = [grad(values[..., i].sum(), leaf, create_graph=True, checked=True) for i in range(values.shape[-1])]
    return torch.stack(found, -2) if found else leaf.new_zeros(*leaf.shape[:-1], 0, leaf.shape[-1])


def split(at: Tangents, multipliers: Tensor, slacks: int) -> tuple[Tensor, Tensor]:
    """z and nu, of c and e themselves, of the multipliers of the rows of `tangent`, whose inequalities have length one.

    Args:
        at: the constraints at the point.
        multipliers: `(*batch, rows)`.
        slacks: how many inequalities there are, linear ones included.
    """
    k, m, first = at.c.shape[-1], at.e.shape[-1], multipliers.shape[-1] - slacks
    z = multipliers[..., multipliers.shape[-1] - k :] / lengths(at.C.detach())
    return z, multipliers[..., first - m : first]
