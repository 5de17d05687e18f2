"""Convex programs with many variables, bounds and few linear constraints, by products alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._linear import LinearOperator
from bilevel._numerics.polyhedron_projection import projected, separates
from bilevel._numerics.rows import matrix_times, positive_or_one, row_moduli
from bilevel._result import Solved, Status, first_statuses
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, BELOW_1, demand_ranges
from bilevel.inner_problems.polytope import FlatPolytope, padded
from bilevel.requirements.properties import Feature
from bilevel.solvers.minres import MINRES

_GRADIENTS = 10  # steps between tries of Newton's method: most settle what holds
_KRYLOV = 1e-12  # relative residual of a Newton step
_UNBOUNDED = 1e12  # times the size of the start


@final
@dataclass(frozen=True)
class ActiveSet(AbstractInnerSolver):
    """argmin {g(y) : A y = b, G y <= h, lower <= y <= upper} for many y, few rows of A and G: nothing is q x q.

    Accelerated projected gradient steps, restarted where they turn back, find what holds; the projection onto the
    feasible set is Newton's method on the multipliers of the rows, of which there are few. In between, Newton steps on
    the entries that no bound holds, by `MINRES` with Hessian products, [[H_FF, A_F'], [A_F, 0]]: kept where they lower
    the violation, and exact for a quadratic g once what holds is found. g convex and smooth.

    `Solved.residual` is the largest violation of the optimality conditions at the returned point, as that of
    `QuadraticProgram`, which is faster for up to some hundred y, as `InteriorPoint` is.

    Statuses: `infeasible` with a certificate; `diverged` where y grows endlessly; `max_steps`; `stagnated`.

    Cost: a gradient a step, some 14 products for its length; m n flops for a projection step, with n = q + k entries
    and m rows, k of them inequalities; a Newton step takes products as MINRES takes steps. Memory O(m n): A is dense,
    with a column for each inequality. Rows of a batch are independent.

    Source: Beck, Teboulle, "A fast iterative shrinkage-thresholding algorithm", SIAM J. Imaging Sci. 2 (2009);
    O'Donoghue, Candes, "Adaptive restart for accelerated gradient schemes", Found. Comput. Math. 15 (2015).

    Args:
        tol: of the violation; None: 1e-10, or 1e-5 in float32.
        max_steps: at most so many gradient steps.

    Raises:
        ValueError: if `tol` or `max_steps` is negative.

    Example:
        >>> from bilevel import AID, BilevelProblem, Polytope, hypergradient
        >>> problem = BilevelProblem(
        ...     lambda x, y: y[0],
        ...     lambda x, y: (y - x).square().sum() / 2,
        ...     constraints=lambda x: Polytope(A=torch.ones(1, 10_000), b=1.0, lower=0.0),
        ... )
        >>> x = torch.zeros(10_000)
        >>> x[:3] = torch.tensor([0.5, 0.3, 0.8])
        >>> hypergradient(
        ...     problem, x, torch.zeros(10_000), estimator=AID(ActiveSet(), MINRES())
        ... ).grad[:4]
        tensor([ 0.6667, -0.3333, -0.3333,  0.0000])
    """

    tol: float | None = None
    max_steps: int = 5000

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, tol=BELOW_1, max_steps=AT_LEAST_0)

    @property
    def heeds(self) -> frozenset[Feature]:
        return frozenset({Feature.constraints})

    @property
    def forgets_start(self) -> bool:
        return True

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        tol = (1e-10 if y0.dtype == torch.float64 else 1e-5) if self.tol is None else self.tol
        face = _Feasible.of(objective, y0)
        w, nu, off = face.projected(face.polytope.with_slacks(y0.detach()))
        infeasible = (off > 1e-6) & separates(nu, *(face.rows(part, k) for part, k in face.parts)).reshape(off.shape)
        top = objective.largest_curvature(face.natural(w)).clamp_min(torch.finfo(y0.dtype).tiny)
        step = (1 / top).unsqueeze(-1)
        steps, ahead, momentum = 0, w, torch.ones_like(step)
        error, multipliers = face.violation(w)
        best = w, multipliers, error
        while bool((best[2] > tol).any()) and not bool(infeasible.all()) and steps < self.max_steps:
            for _ in range(min(_GRADIENTS, self.max_steps - steps)):
                gradient = face.gradient(ahead)
                moved, nu, _ = face.projected(ahead - step * gradient, nu)
                back = ((ahead - moved) * (moved - w)).sum(-1, keepdim=True) > 0
                following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
                momentum_now = torch.where(back, 1.0, momentum)
                following = torch.where(back, 1.0, following)
                ahead = moved + torch.where(back, 0.0, (momentum_now - 1) / following) * (moved - w)
                w, momentum, steps = moved, following, steps + 1
            error, multipliers = face.violation(w)
            best = _better((w, multipliers, error), best)
            tried = face.newton(w, multipliers)
            gained = _better(tried, best)
            if bool((gained[2] < 0.5 * best[2]).any()):
                kept = (gained[2] < best[2]).unsqueeze(-1)
                w, ahead = torch.where(kept, gained[0], w), torch.where(kept, gained[0], ahead)
                momentum = torch.where(kept, 1.0, momentum)
            best = gained
            if bool((row_moduli(w) > _UNBOUNDED * (1 + row_moduli(y0))).all()):
                break
        objective.tally.inner_steps += steps * best[2].numel()
        y = face.natural(best[0])
        objective.last_gradient(y)
        size = row_moduli(best[0]).squeeze(-1)
        unsolved = ~(best[2] <= tol)
        statuses = first_statuses(
            (~best[2].isfinite() & ~infeasible, Status.nonfinite),
            (infeasible, Status.infeasible),
            (unsolved & (size > _UNBOUNDED * (1 + row_moduli(y0).squeeze(-1))), Status.diverged),
            (unsolved & torch.full_like(unsolved, steps >= self.max_steps), Status.max_steps),
            (unsolved, Status.stagnated),
        )
        held = int(((best[0] <= face.polytope.lower) | (best[0] >= face.polytope.upper)).sum())
        return Solved(y, statuses, best[2], steps, held, best[1])

    @property
    def tolerance(self) -> float | None:
        return self.tol

    def with_tolerance(self, tol: float) -> ActiveSet:
        return replace(self, tol=tol)

    def with_steps(self, steps: int) -> ActiveSet:
        return replace(self, max_steps=steps)


_Ended = tuple[Tensor, Tensor, Tensor]  # a point, multipliers, the violation


def _better(new: _Ended, old: _Ended) -> _Ended:
    """The one with less violation, row by row."""
    less = new[2] < old[2]
    row = less.unsqueeze(-1)
    return torch.where(row, new[0], old[0]), torch.where(row, new[1], old[1]), torch.where(less, new[2], old[2])


@final
@dataclass(frozen=True, eq=False)
class _Feasible:
    """The feasible set in entries of y and slacks, and the optimality conditions on it."""

    objective: Objective
    polytope: FlatPolytope
    q: int

    @staticmethod
    def of(objective: Objective, y0: Tensor) -> _Feasible:
        polytope = objective.constraints
        if polytope is None:
            free = torch.full_like(y0, torch.inf)
            rows = y0.new_zeros(*y0.shape[:-1], 0, y0.shape[-1])
            polytope = FlatPolytope(rows, y0.new_zeros(*y0.shape[:-1], 0), -free, free)
        batch = y0.shape[:-1]
        A, b, lower, upper = (
            part.detach().expand(*batch, *part.shape[part.dim() - axes :])
            for part, axes in zip(polytope.tensors(), (2, 1, 1, 1), strict=True)
        )
        return _Feasible(objective, FlatPolytope(A, b, lower, upper), y0.shape[-1])

    @property
    def parts(self) -> tuple[tuple[Tensor, int], ...]:
        p = self.polytope
        return (p.A, 2), (p.b, 1), (p.lower, 1), (p.upper, 1)

    def rows(self, part: Tensor, axes: int) -> Tensor:
        """With one axis of rows."""
        batch, own = part.shape[: part.dim() - axes], part.shape[part.dim() - axes :]
        return part.reshape(batch.numel(), *own)  # whose own axes may be empty

    def natural(self, w: Tensor) -> Tensor:
        return w[..., : self.q]

    def gradient(self, w: Tensor) -> Tensor:
        return padded(self.objective.gradient(self.natural(w)), w)

    def projected(self, v: Tensor, nu: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        start = None if nu is None else self.rows(nu, 1)
        A, b, lower, upper = (self.rows(part, k) for part, k in self.parts)
        w, found, off = projected(self.rows(v, 1), A, b, lower, upper, start)
        return w.reshape(v.shape), found.reshape(self.polytope.b.shape), off.reshape(v.shape[:-1])

    def violation(self, w: Tensor, multipliers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The largest relative violation, and multipliers: by least squares on the free entries if none are given."""
        p = self.polytope
        _, own, hessian = self.objective.hessian(self.natural(w))
        slope, curved = padded(own, w), padded(hessian.mv(self.natural(w)), w)
        finite = torch.stack([torch.where(limit.isfinite(), limit, w) for limit in (p.lower, p.upper)])
        primal = positive_or_one(torch.maximum(row_moduli(finite).amax(0), row_moduli(w)))
        if multipliers is None:
            free = (w > p.lower) & (w < p.upper)
            A_F = p.A * free.unsqueeze(-2)
            M, side = A_F @ A_F.mT, matrix_times(A_F, slope * free)
            multipliers = -matrix_times(torch.linalg.pinv(M, hermitian=True), side)
        force = matrix_times(p.A.mT, multipliers)
        # Where nothing holds the gradient is the rounding of what cancels in it, such as H y.
        dual = positive_or_one(row_moduli(torch.stack([slope, force, curved]).abs().amax(0)))
        pull = (slope + force) / dual
        above, below = (p.upper - w) / primal, (w - p.lower) / primal
        outside = torch.maximum(-above, -below).clamp_min(0)
        unmatched = torch.where(
            pull > 0, torch.minimum(pull, below.clamp_min(0)), torch.minimum(-pull, above.clamp_min(0))
        )
        equality = (matrix_times(p.A, w) - p.b) / primal
        worst = torch.cat([row_moduli(part) for part in (outside, unmatched, equality)], -1).amax(-1)
        return torch.where(worst.isnan(), torch.inf, worst), multipliers

    def newton(self, w: Tensor, multipliers: Tensor) -> _Ended:
        """A Newton step on the entries that no bound holds, cut to the bounds; with the multipliers it leads to."""
        p, n = self.polytope, w.shape[-1]
        _, slope, hessian = self.objective.hessian(self.natural(w))
        slope = padded(slope, w)
        free = (w > p.lower) & (w < p.upper)
        A_F = p.A * free.unsqueeze(-2)

        def mv(v: Tensor) -> Tensor:
            u, s = torch.where(free, v[..., :n], 0.0), v[..., n:]
            hu = padded(hessian.mv(self.natural(u)), u)
            top = torch.where(free, hu, v[..., :n]) + matrix_times(A_F.mT, s)
            return torch.cat([top, matrix_times(A_F, u)], -1)

        force = slope + matrix_times(p.A.mT, multipliers)
        right = torch.cat([-torch.where(free, force, 0.0), p.b - matrix_times(p.A, w)], -1)
        system = MINRES(rtol=_KRYLOV).solve(LinearOperator(mv, right.shape[-1]), right)
        moved = (w + system.value[..., :n]).clamp(p.lower, p.upper)
        there = multipliers + system.value[..., n:]
        error, _ = self.violation(moved, there)
        return moved, there, error
