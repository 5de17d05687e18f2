"""Optimality conditions under constraints to first order, by products with the gradients of the constraints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from bilevel._calculus import Linearization
from bilevel._linear import LinearOperator, SaddleBlocks, SparseBlocks
from bilevel._numerics.krylov import solve_by_runs
from bilevel._numerics.minimal_residual import minimal_residual
from bilevel._numerics.rows import positive_or_one, safe_row_norms
from bilevel._numerics.sparse_rows import SparseRows, joined
from bilevel._result import Report, Status
from bilevel.inner_problems.constraint_products import ConstraintProducts
from bilevel.inner_problems.margins import kink_report
from bilevel.inner_problems.nonlinear_constraints import FlatConstraints
from bilevel.inner_problems.polytope import FlatPolytope
from bilevel.inner_problems.qualification import SEEN, second_order, widths

if TYPE_CHECKING:
    from bilevel.inner_problems.multipliers import Multipliers

_DENSE = 2000  # entries of y up to which definiteness is measured by a factorization
_MATCHED = 1e-9  # relative: what a motion of constraints is followed to
_STEPS = 5000
_APART = 1e-3  # of a motion: so much is no matter of steps


@final
@dataclass(frozen=True, eq=False)
class ByProducts:
    """grad_y L = 0 on the entries F that no bound holds, E_A(x, y) = 0 for the constraints A that hold, to first order.

    With S the scaled rows S = diag(d) J_A, d a number over the length of each, the matrix of the adjoint system is
    [[L_FF, S_F'], [S_F, 0]], and a multiple of the identity on the entries and constraints that are not in it.

    Attributes:
        at: g to first order at y.
        x: a leaf `(p,)` that the constraints have their graph from.
        rows: the constraints at y, with their multipliers for weights.
        sparse: the matrix of their gradients, inequalities first, where it is known as a sparse one.
        bounds: on y.
        free: the entries that no bound holds `(*batch, q)`.
        upper: of the others, those on their upper bound.
        on: the constraints that hold `(*batch, k + m)`.
        d: the scales of rows.
        size: of the Hessian of g, and of rows after scaling.
        margin: the least relative distance or multiplier `(*batch,)`.
    """

    at: Linearization
    x: Tensor
    rows: ConstraintProducts
    sparse: SparseRows | None
    bounds: FlatPolytope
    free: Tensor
    upper: Tensor
    on: Tensor
    d: Tensor
    size: Tensor
    margin: Tensor

    @staticmethod
    def at_solution(
        at: Linearization,
        constraints: FlatConstraints,
        bounds: FlatPolytope,
        x: Tensor,
        y: Tensor,
        curved: Tensor,
        multipliers: Tensor | None,
    ) -> ByProducts:
        """What holds at y, by multipliers beside distances.

        Args:
            at: g to first order.
            constraints: c and e, with a graph from x where they move.
            bounds: on y.
            x: the leaf.
            y: the solution `(*batch, q)`.
            curved: H y, whose size the gradient has cancelled from.
            multipliers: of c and e; None: those that fit.
        """
        lower, upper = (part.detach().expand_as(y) for part in (bounds.lower, bounds.upper))
        plain = ConstraintProducts.at(constraints, y)
        length, k = plain.lengths(), plain.inequalities
        finite = torch.stack([torch.where(bound.isfinite(), bound, y) for bound in (lower, upper)])
        primal = positive_or_one(torch.maximum(finite.abs().amax(0), y.abs()).amax(-1, keepdim=True))
        low = y - lower < upper - y
        near = torch.minimum(y - lower, upper - y) / primal
        away = (-plain.values.detach() / length / primal)[..., :k]
        away = torch.cat([away, torch.zeros_like(length[..., k:])], -1)
        if multipliers is None:
            little = torch.finfo(y.dtype).eps ** 0.5
            multipliers = _fitted(plain, at.gradient, near > little, away <= little, length)
        force = plain.transposed(multipliers)
        pull = at.gradient + force
        dual = positive_or_one(torch.stack([at.gradient, curved, force]).abs().amax(0).amax(-1, keepdim=True))
        pushed = torch.where(low, pull, -pull) / dual
        fixed = lower >= upper
        free = (near > pushed.clamp_min(0)) & ~fixed
        strength = multipliers * length / dual
        on = ~(away > strength.clamp_min(0))
        on[..., k:] = True
        parts = [torch.where(fixed, torch.inf, torch.where(free, near, pushed))]
        parts += [torch.where(on, strength, away)[..., :k]] if k else []
        margin = torch.cat(parts, -1).amin(-1)
        rows = ConstraintProducts.at(constraints, y, torch.where(on, multipliers, 0.0))
        signs = torch.randint(0, 2, y.shape[-1:], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        seen = safe_row_norms(at.operator.mv((signs.to(y) * 2 - 1).expand_as(y).contiguous())) / y.shape[-1] ** 0.5
        size = positive_or_one(torch.where(seen.isfinite(), seen, 0.0)).unsqueeze(-1)
        sparse = None if constraints.sparse is None or y.dim() > 1 else joined(*constraints.sparse)
        return ByProducts(at, x, rows, sparse, bounds, free, ~low, on, size / length, size, margin)

    @property
    def z(self) -> Tensor:
        """The multipliers of c."""
        return self.rows.weights.detach()[..., : self.rows.inequalities]

    @property
    def nu(self) -> Tensor:
        """The multipliers of e."""
        return self.rows.weights.detach()[..., self.rows.inequalities :]

    @property
    def pushes(self) -> tuple[Tensor, Tensor]:
        """The multipliers of lower and of upper bounds."""
        force = torch.where(self.free, 0.0, self.at.gradient + self.rows.pull.detach())
        fixed = self._fixed
        below = torch.where(fixed | ~self.upper, force, 0.0).clamp_min(0)
        return below, torch.where(fixed | self.upper, -force, 0.0).clamp_min(0)

    @property
    def _fixed(self) -> Tensor:
        return (self.bounds.lower >= self.bounds.upper).expand_as(self.free)

    @property
    def moves(self) -> bool:
        """Whether constraints or bounds depend on x."""
        return bool(self._motion_of_rows() is not None or self._bound().requires_grad)

    def report(self, least: float) -> Report:
        """Strict complementarity, in words."""
        return kink_report("active bounds", self.margin, least)

    def _bound(self) -> Tensor:
        """The nearer bound, where there is one; with its graph."""
        y = self.rows.y.detach()
        bound = torch.where(self.upper, self.bounds.upper, self.bounds.lower)
        return torch.where(self.free | ~bound.isfinite(), y, bound)

    def _in_x(self, value: Tensor) -> Tensor:
        if not value.requires_grad:
            return torch.zeros_like(self.x)
        (found,) = torch.autograd.grad(value, self.x, retain_graph=True, allow_unused=True, materialize_grads=True)
        return found

    def _motion_of_rows(self) -> Tensor | None:
        """d(w'E)/dx at the weights, with its graph, from which (dE/dx) times a vector follows; None: E stays."""
        if not self.rows.values.requires_grad:
            return None
        with torch.enable_grad():
            total = (self.rows.values * self.rows.weights).sum()
            (found,) = torch.autograd.grad(total, self.x, create_graph=True, allow_unused=True)
        return found if found is None or found.requires_grad else None

    def _stretched(self, u: Tensor) -> Tensor:
        """S u, on the constraints that hold."""
        return torch.where(self.on, self.d * self.rows.times(u), 0.0)

    def _pulled(self, s: Tensor) -> Tensor:
        """S's."""
        return self.rows.transposed(torch.where(self.on, self.d * s, 0.0))

    def independence(self) -> Report:
        """Whether y can follow the constraints that hold as x moves along a random direction.

        That is S_F w = r, r the motion of the constraints and of the bounds that hold: where it has a solution, rows
        that are dependent stay so, and do no harm. The residual is what is left of r, relative.
        """
        part = "independence of active constraints"
        own, bound = self._motion_of_rows(), self._bound()
        if own is None and not bound.requires_grad:
            return Report(part, Status.successful, 0.0, 0)
        generator = torch.Generator("cpu").manual_seed(0)
        direction = torch.randn(self.x.shape, generator=generator, dtype=torch.float64, device="cpu").to(self.x)
        r = torch.zeros_like(self.d)
        if own is not None:
            (moved,) = torch.autograd.grad(own, self.rows.weights, direction, retain_graph=True, materialize_grads=True)
            r = r + moved * self.d
        if bound.requires_grad:
            with torch.enable_grad():
                leaf = torch.zeros_like(bound, requires_grad=True)
                (along,) = torch.autograd.grad((bound * leaf).sum(), self.x, create_graph=True, allow_unused=True)
            if along is not None and along.requires_grad:
                (slid,) = torch.autograd.grad(along, leaf, direction, materialize_grads=True)
                r = r + self.d * self.rows.times(torch.where(self.free, 0.0, slid))
        r = torch.where(self.on, r, 0.0)

        def mv(w: Tensor) -> Tensor:
            return torch.where(self.on, self._stretched(self._pulled(w) * self.free), self.size**2 * w)

        operator = LinearOperator(mv, r.shape[-1], symmetric=True)
        steps = min(_STEPS, 20 * r.shape[-1])
        found = solve_by_runs(minimal_residual, operator, r, None, rtol=_matched(r), max_steps=steps)
        left = safe_row_norms(r - mv(found.value)) / positive_or_one(safe_row_norms(r))
        seen = max(SEEN, 10 * _matched(r))
        statuses = tuple(
            Status.successful
            if each <= seen
            else Status.nonfinite
            if each != each
            else Status.max_steps
            if status is Status.max_steps and each < _APART
            else Status.dependent_constraints
            for each, status in zip(left.reshape(-1).tolist(), found.statuses, strict=True)
        )
        worst = Status.worst(statuses)
        return Report(part, worst, float(left.max()), found.steps, statuses if left.dim() else ())

    def linearization(self, reports: tuple[Report, ...], multipliers: Multipliers) -> Linearization:
        """The system of what holds, its right-hand side, and how it moves with x."""
        at, free, on, size, q = self.at, self.free, self.on, self.size, self.free.shape[-1]
        seen: list[tuple[Tensor, int, Tensor]] = []  # the latest (u, s), and L_yy u there

        def split(v: Tensor) -> tuple[Tensor, Tensor]:
            return torch.where(free, v[..., :q], 0.0), torch.where(on, v[..., q:], 0.0)

        def applied(v: Tensor, hu: Tensor, u: Tensor, s: Tensor) -> Tensor:
            ju, bent = self.rows.both(u)
            curved = hu + bent
            seen[:] = [(v, v._version, curved)]
            top = torch.where(free, curved + self._pulled(s), size * v[..., :q])
            return torch.cat([top, torch.where(on, self.d * ju, size * v[..., q:])], -1)

        def mv(v: Tensor) -> Tensor:
            u, s = split(v)
            return applied(v, at.operator.mv(u), u, s)

        def products(v: Tensor) -> tuple[Tensor, Tensor | None]:
            u, s = split(v)
            hu, gu = at.products(u)
            return applied(v, hu, u, s), gu

        def pull(v: Tensor) -> Tensor | None:
            return at.cross(split(v)[0])

        def moved(v: Tensor, fy: Tensor) -> Tensor:
            u, s = split(v)
            known = bool(seen) and seen[0][0] is v and seen[0][1] == v._version
            curved = seen[0][2] if known else at.operator.mv(u) + self.rows.both(u)[1]
            t = torch.where(free, 0.0, fy - curved - self._pulled(s))
            with torch.enable_grad():
                own = (self.rows.pull * u).sum() + (self.rows.values * (self.d * s)).sum()
                return self._in_x(own) - self._in_x((t * self._bound()).sum())

        def right_hand_side(fy: Tensor) -> Tensor:
            return torch.cat([torch.where(free, fy, 0.0), torch.zeros_like(self.d)], -1)

        lower, upper = (part.expand_as(free) for part in (self.bounds.lower, self.bounds.upper))
        return Linearization(
            at.y,
            at.gradient,
            mv,
            products,
            pull,
            operator=LinearOperator(mv, q + on.shape[-1], symmetric=True, sparse=self._blocks()),
            right_hand_side=right_hand_side,
            moved=moved,
            reports=(*reports, self.independence(), *widths(lower, upper, self._in_x)),
            multipliers=multipliers,
            second_order=None if q > _DENSE else self._second_order,
        )

    def _blocks(self) -> SparseBlocks | None:
        if self.sparse is None:
            return None
        S = self.sparse
        scaled = SparseRows(S.rows, S.columns, S.values.detach() * self.d[S.rows], S.shape)
        M = LinearOperator(lambda u: self.at.operator.mv(u) + self.rows.both(u)[1], self.free.shape[-1])
        return SparseBlocks(M, scaled, self.free, self.on, self.size)

    def _second_order(self) -> Report:
        """Whether L_yy is positive definite along what holds, by the matrices themselves."""
        y = self.rows.y.detach()

        def leading(u: Tensor) -> Tensor:
            own = torch.where(self.free, u, 0.0)
            return torch.where(self.free, self.at.operator.mv(own) + self.rows.both(own)[1], u)

        units = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
        columns = [self._stretched(torch.where(self.free, unit.expand_as(y), 0.0)) for unit in units]
        S = torch.stack(columns, -1)
        return second_order(SaddleBlocks(LinearOperator(leading, y.shape[-1]), S, self.free), y)


def _fitted(rows: ConstraintProducts, gradient: Tensor, free: Tensor, on: Tensor, length: Tensor) -> Tensor:
    """The multipliers of the constraints that seem to hold with the least |grad_F g + J_F'w|."""

    def mv(w: Tensor) -> Tensor:
        pull = rows.transposed(torch.where(on, w / length, 0.0)) * free
        return torch.where(on, rows.times(pull) / length, w)

    right = torch.where(on, -rows.times(gradient * free) / length, 0.0)
    operator = LinearOperator(mv, right.shape[-1], symmetric=True)
    found = solve_by_runs(minimal_residual, operator, right, None, rtol=_matched(right), max_steps=_STEPS)
    return torch.where(on, found.value / length, 0.0)


def _matched(like: Tensor) -> float:
    return _MATCHED if like.dtype == torch.float64 else 1e-5
