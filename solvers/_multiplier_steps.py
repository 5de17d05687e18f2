"""What the proximal method of multipliers is made of: its function, Newton's method on that, and its exact end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from bilevel._calculus import grad
from bilevel._inner import Objective
from bilevel._linear import LinearOperator
from bilevel._numerics.rows import matrix_times, positive_or_one, row_dots, row_moduli, safe_row_norms
from bilevel._result import Status
from bilevel.inner_problems.constraint_products import ConstraintProducts
from bilevel.inner_problems.nonlinear_constraints import FlatConstraints
from bilevel.solvers.cg import CG
from bilevel.solvers.minres import MINRES

# (constraints at a point, H, entries that no bound holds, constraints that hold, the point with its multipliers, the
# same point on the bounds that hold, constraints there) -> the next point and its multipliers
End: TypeAlias = Callable[
    [ConstraintProducts, LinearOperator, Tensor, Tensor, "Primal", Tensor, Tensor], tuple[Tensor, Tensor]
]

_NEWTON = 30  # steps of a round
_SLOPE = 0.5  # of the slope along a step, what may be left of it with the other sign
_HALVINGS = 40
_KRYLOV = 1000  # products of a step
_ENDS, _IDLE = 10, 3  # Newton steps on what holds; without half the violation
_SLIGHT, _BEYOND = 1e-6, 1e4  # violations that count; distances within which no point satisfies the constraints


@final
@dataclass(frozen=True, eq=False)
class Primal:
    """A point with multipliers, and by how much the optimality conditions are violated there.

    Attributes:
        y: `(*batch, q)`.
        w: multipliers of the constraints over the lengths of their gradients `(*batch, k + m)`.
        below: of lower bounds `(*batch, q)`.
        above: of upper bounds.
        error: the largest relative violation `(*batch,)`.
        feasibility: the largest of those of constraints and bounds.
    """

    y: Tensor
    w: Tensor
    below: Tensor
    above: Tensor
    error: Tensor
    feasibility: Tensor

    def where(self, chosen: Tensor, other: Primal) -> Primal:
        """This one in the rows that are chosen `(*batch, 1)`, the other elsewhere."""
        row = chosen.squeeze(-1)
        vectors = [torch.where(chosen, *pair) for pair in zip(self._vectors, other._vectors, strict=True)]
        error, feasibility = (
            torch.where(row, *pair) for pair in ((self.error, other.error), (self.feasibility, other.feasibility))
        )
        return Primal(vectors[0], vectors[1], vectors[2], vectors[3], error, feasibility)

    def better(self, other: Primal) -> Primal:
        """The one with less violation, row by row."""
        return self.where((self.error < other.error).unsqueeze(-1), other)

    @property
    def _vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.y, self.w, self.below, self.above


@final
@dataclass(frozen=True, eq=False)
class Relaxed:
    """The program with its constraints over the lengths of their gradients.

    Attributes:
        objective: g.
        constraints: c and e, those of a polytope first.
        lower: bounds `(*batch, q)`.
        upper: likewise.
        lengths: of the gradients of the constraints `(*batch, k + m)`.
        k: the number of inequalities.
    """

    objective: Objective
    constraints: FlatConstraints
    lower: Tensor
    upper: Tensor
    lengths: Tensor
    k: int

    @staticmethod
    def of(objective: Objective, y0: Tensor) -> Relaxed:
        """At a start."""
        polytope, own = objective.constraints, objective.nonlinear
        if own is None:
            own = FlatConstraints(lambda y: y[..., :0], lambda y: y[..., :0])
        lower, upper = torch.full_like(y0, -torch.inf), torch.full_like(y0, torch.inf)
        if polytope is not None:
            A, b, low, high, G, h = (part.detach() for part in polytope.natural(y0.shape[-1]))
            lower, upper = low.expand_as(y0), high.expand_as(y0)
            if A.shape[-2] or G.shape[-2]:
                c, e = own.inequalities, own.equalities
                own = FlatConstraints(
                    lambda y: torch.cat([matrix_times(G, y) - h, c(y)], -1),
                    lambda y: torch.cat([matrix_times(A, y) - b, e(y)], -1),
                )
        at = ConstraintProducts.at(own, y0)
        return Relaxed(objective, own, lower, upper, at.lengths(), at.inequalities)

    def curvature(self, y: Tensor) -> Tensor:
        """The size of the Hessian of g, or of its gradient over that of y where it has none: `(*batch, 1)`."""
        top = self.objective.largest_curvature(y).unsqueeze(-1)
        slope = row_moduli(self.objective.gradient(y)) / (1 + row_moduli(y))
        little = torch.finfo(y.dtype).eps * slope
        return positive_or_one(torch.where(top.isfinite() & (top > little), top, slope))

    def start(self, y0: Tensor) -> Primal:
        """At y0 within the bounds, without multipliers."""
        y = torch.maximum(torch.minimum(y0.detach(), self.upper), self.lower)
        return self.measured(y, torch.zeros_like(self.lengths))

    def multipliers(self, at: Primal) -> Tensor:
        """Those of the constraints as they were written: of c, then of e."""
        return at.w / self.lengths

    def measured(self, y: Tensor, w: Tensor) -> Primal:
        """The violation at y with multipliers of the constraints; those of bounds are what is left of the gradient."""
        rows = ConstraintProducts.at(self.constraints, y)
        E, force = rows.values.detach() / self.lengths, rows.transposed(w / self.lengths)
        _, slope, hessian = self.objective.hessian(y)
        finite = torch.stack([torch.where(bound.isfinite(), bound, y) for bound in (self.lower, self.upper)])
        primal = positive_or_one(torch.maximum(row_moduli(finite).amax(0), row_moduli(y)))
        dual = _size_of_forces(slope, force, hessian, y)
        pull = (slope + force) / dual
        over, under = (self.upper - y) / primal, (y - self.lower) / primal
        outside = torch.maximum(-over, -under).clamp_min(0)
        unmatched = torch.where(
            pull > 0, torch.minimum(pull, under.clamp_min(0)), torch.minimum(-pull, over.clamp_min(0))
        )
        c, e, z = E[..., : self.k] / primal, E[..., self.k :] / primal, w[..., : self.k] / dual
        feasibility = torch.cat([row_moduli(part) for part in (outside, c.clamp_min(0), e)], -1).amax(-1)
        loose = torch.maximum(torch.minimum(z.clamp_min(0), (-c).clamp_min(0)), -z)
        error = torch.maximum(feasibility, torch.cat([row_moduli(part) for part in (unmatched, loose)], -1).amax(-1))
        left = slope + force
        low, high = left.clamp_min(0) * self.lower.isfinite(), (-left).clamp_min(0) * self.upper.isfinite()
        touches = torch.minimum(over, under) <= 1e-6
        infinite = torch.full_like(error, torch.inf)
        return Primal(
            y,
            w,
            torch.where(touches, low, 0.0),
            torch.where(touches, high, 0.0),
            torch.where(error.isnan(), infinite, error),
            torch.where(feasibility.isnan(), infinite, feasibility),
        )

    def _penalty(self, y: Tensor, at: Primal, r: Tensor) -> Tensor:
        """sum max(0, w + r E)^2 / (2 r) and the like for equalities and bounds: `(*batch,)`."""
        c, e = self.constraints.inequalities(y), self.constraints.equalities(y)
        k = self.k
        found = (at.w[..., :k] + r * c / self.lengths[..., :k]).clamp_min(0).square().sum(-1)
        found = found + (at.w[..., k:] + r * e / self.lengths[..., k:]).square().sum(-1)
        found = found + (at.above + r * (y - self.upper)).clamp_min(0).square().sum(-1)
        found = found + (at.below + r * (self.lower - y)).clamp_min(0).square().sum(-1)
        total: Tensor = found / (2 * r.squeeze(-1))
        return total

    def _slope(self, y: Tensor, at: Primal, r: Tensor, s: Tensor, d: Tensor) -> Tensor:
        """The slope along d of the function of a round."""
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            pull = grad(self._penalty(leaf, at, r).sum(), leaf)
        return row_dots(self.objective.gradient(y) + pull + s * (y - at.y), d)

    def round(self, at: Primal, r: Tensor, s: Tensor, rows: Tensor, most: int) -> tuple[Primal, int, Tensor]:
        """The minimizer of a round and the multipliers that it leads to, the Newton steps, and where it was concave."""
        y, steps, concave = at.y, 0, torch.zeros_like(rows)
        first = None
        for _ in range(min(_NEWTON, most)):
            _, slope, hessian = self.objective.hessian(y)
            with torch.enable_grad():
                leaf = y.detach().requires_grad_()
                pull = grad(self._penalty(leaf, at, r).sum(), leaf, create_graph=True, checked=True)
            F = slope + pull.detach() + s * (y - at.y)
            size = safe_row_norms(F)
            first = size if first is None else first
            scale = safe_row_norms(slope) + safe_row_norms(pull.detach()) + safe_row_norms(hessian.mv(y))
            aim = torch.maximum((0.01 * at.error * scale), 1e2 * torch.finfo(y.dtype).eps * scale)
            going = rows & (size > aim) & size.isfinite()
            if not bool(going.any()):
                break

            def mv(v: Tensor, leaf: Tensor = leaf, pull: Tensor = pull, hessian: LinearOperator = hessian) -> Tensor:
                bent = (
                    torch.autograd.grad(pull, leaf, v, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
                    if pull.requires_grad
                    else torch.zeros_like(v)
                )
                return hessian.mv(v) + bent + s * v

            right = torch.where(going.unsqueeze(-1), -F, 0.0)
            tight = float((aim / positive_or_one(size)).clamp(1e-10, 0.1)[going].min())
            system = CG(rtol=max(tight, 0.01), max_steps=_KRYLOV).solve(
                LinearOperator(mv, y.shape[-1], positive_definite=True), right
            )
            bent = torch.tensor([each is Status.negative_curvature for each in system.statuses], device=y.device)
            concave = concave | bent.reshape(concave.shape)
            d = system.value
            down = row_dots(F, d)
            d = torch.where((down < 0).unsqueeze(-1), d, right / positive_or_one(r))
            down = row_dots(F, d)
            t = torch.ones_like(down)
            open_ = going & (down < 0)
            moving = open_
            for _ in range(_HALVINGS):
                if not bool(open_.any()):
                    break
                ahead = self._slope(y + t.unsqueeze(-1) * d, at, r, s, d)
                open_ = open_ & ~(ahead <= _SLOPE * down.abs())
                t = torch.where(open_, t / 2, t)
            y = torch.where((moving & ~open_).unsqueeze(-1), y + t.unsqueeze(-1) * d, y)
            steps += 1
        c, e = self.constraints.values(y)
        z = (at.w[..., : self.k] + r * c / self.lengths[..., : self.k]).clamp_min(0)
        nu = at.w[..., self.k :] + r * e / self.lengths[..., self.k :]
        inside = torch.maximum(torch.minimum(y, self.upper), self.lower)
        found = self.measured(inside, torch.cat([z, nu], -1))
        above = (at.above + r * (y - self.upper)).clamp_min(0)
        below = (at.below + r * (self.lower - y)).clamp_min(0)
        outside = row_moduli(y - inside).squeeze(-1) / positive_or_one(row_moduli(inside)).squeeze(-1)
        apart = torch.maximum(found.feasibility, outside)
        found = Primal(inside, found.w, below, above, found.error, apart)
        return found.where(rows.unsqueeze(-1), at), steps, concave

    def newton(self, at: Primal, tol: float, most: int, end: End | None = None) -> tuple[Primal, int]:
        """Newton's method on the optimality conditions with what seems to hold as equalities; the best point met.

        A bound or an inequality holds if its multiplier is above its distance, both relative, at each step anew.

        Args:
            at: where to start.
            tol: of the violation.
            most: at most so many steps.
            end: makes a step; None: by `MINRES`.
        """
        best, steps, idle = at, 0, 0
        k = self.k
        while steps < min(_ENDS, most) and idle < _IDLE and bool((best.error > tol * 1e-2).any()):
            rows = ConstraintProducts.at(self.constraints, at.y, at.w / self.lengths)
            _, slope, hessian = self.objective.hessian(at.y)
            force = rows.transposed(at.w / self.lengths)
            finite = torch.stack([torch.where(bound.isfinite(), bound, at.y) for bound in (self.lower, self.upper)])
            primal = positive_or_one(torch.maximum(row_moduli(finite).amax(0), row_moduli(at.y)))
            dual = _size_of_forces(slope, force, hessian, at.y)
            low, high = at.below / dual > (at.y - self.lower) / primal, at.above / dual > (self.upper - at.y) / primal
            fixed = self.lower >= self.upper
            free = ~(low | high | fixed)
            y = torch.where(low | fixed, self.lower, torch.where(high, self.upper, at.y))
            E = torch.cat(self.constraints.values(y), -1) / self.lengths
            on = torch.cat(
                [
                    at.w[..., :k] / dual > -rows.values.detach()[..., :k] / self.lengths[..., :k] / primal,
                    torch.ones_like(at.w[..., k:], dtype=torch.bool),
                ],
                -1,
            )
            ahead = (self._end if end is None else end)(rows, hessian, free, on, at, y, E)
            steps += 1
            now = self.measured(*ahead)
            gained = now.better(best)
            idle = 0 if bool((gained.error < 0.5 * best.error).any()) else idle + 1
            best, at = gained, now.where(now.error.isfinite().unsqueeze(-1), at)
        return best, steps

    def _end(
        self,
        rows: ConstraintProducts,
        hessian: LinearOperator,
        free: Tensor,
        on: Tensor,
        at: Primal,
        y: Tensor,
        E: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One such step, from y with its entries on the bounds that hold; the point and the multipliers there."""
        q = y.shape[-1]
        d = self._balance(hessian, y) / self.lengths

        def mv(v: Tensor) -> Tensor:
            u, s = torch.where(free, v[..., :q], 0.0), torch.where(on, v[..., q:], 0.0)
            ju, bent = rows.both(u)
            top = torch.where(free, hessian.mv(u) + bent + rows.transposed(d * s), v[..., :q])
            return torch.cat([top, torch.where(on, d * ju, v[..., q:])], -1)

        held = torch.where(on, at.w, 0.0)
        slope = self.objective.gradient(y) + ConstraintProducts.at(self.constraints, y).transposed(held / self.lengths)
        right = torch.cat([torch.where(free, -slope, 0.0), torch.where(on, -E * d * self.lengths, 0.0)], -1)
        single = y.dtype != torch.float64
        solver = MINRES(rtol=1e-6 if single else 1e-12, max_steps=min(10 * right.shape[-1], 5 * _KRYLOV))
        found = solver.solve(LinearOperator(mv, right.shape[-1], symmetric=True), right).value
        moved = torch.maximum(torch.minimum(y + torch.where(free, found[..., :q], 0.0), self.upper), self.lower)
        return moved, torch.where(on, held + d * self.lengths * found[..., q:], 0.0)

    def _balance(self, hessian: LinearOperator, y: Tensor) -> Tensor:
        """The size of the Hessian as a random vector sees it, 1 where it is zero: `(*batch, 1)`."""
        signs = torch.randint(0, 2, y.shape[-1:], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        seen = hessian.mv((signs.to(y) * 2 - 1).expand_as(y).contiguous())
        size = safe_row_norms(seen) / y.shape[-1] ** 0.5
        return positive_or_one(torch.where(size.isfinite(), size, 0.0)).unsqueeze(-1)

    def contradictory(self, y: Tensor) -> Tensor:
        """Whether no point near or far satisfies the constraints: `(*batch,)`, by a certificate.

        Let w be the violations at the point where their squares are least. Then w'E is stationary there, and positive;
        where it is convex, it is positive everywhere.
        """
        none = Primal(y, torch.zeros_like(self.lengths), y * 0, y * 0, y[..., 0] * 0, y[..., 0] * 0)
        one = torch.ones_like(y[..., :1])
        crossed = (self.lower > self.upper).any(-1)
        proven, damping = torch.zeros_like(crossed), 1e-6
        for _ in range(_NEWTON):
            with torch.enable_grad():
                leaf = y.detach().requires_grad_()
                gap = self._penalty(leaf, none, one)
                pull = grad(gap.sum(), leaf, create_graph=True, checked=True)
            F, gap = pull.detach(), 2 * gap.detach()
            reach = _BEYOND * (1 + safe_row_norms(y))
            counts = gap.sqrt() > _SLIGHT * (1 + row_moduli(y).squeeze(-1))
            proven = counts & (safe_row_norms(F) * reach < gap)
            if not bool((counts & ~proven).any()) or not pull.requires_grad:
                break

            def mv(v: Tensor, leaf: Tensor = leaf, pull: Tensor = pull, damping: float = damping) -> Tensor:
                bent = torch.autograd.grad(pull, leaf, v, retain_graph=True, allow_unused=True, materialize_grads=True)[
                    0
                ]
                return bent + damping * v

            system = LinearOperator(mv, y.shape[-1], positive_definite=True)
            ahead = y + CG(rtol=1e-8, max_steps=_KRYLOV // 5).solve(system, -F).value
            with torch.no_grad():
                better = 2 * self._penalty(ahead, none, one) < gap
            y = torch.where(better.unsqueeze(-1), ahead, y)
            damping = damping / 10 if bool(better.any()) else damping * 100
            damping = max(damping, 1e-12)
        found: Tensor = crossed | proven
        return found


def _size_of_forces(slope: Tensor, force: Tensor, hessian: LinearOperator, y: Tensor) -> Tensor:
    """What errors in the gradient are relative to: the largest entry of what cancels in it, H y included."""
    parts = torch.stack([slope, force, hessian.mv(y)]).abs()
    return positive_or_one(row_moduli(parts.amax(0)))
