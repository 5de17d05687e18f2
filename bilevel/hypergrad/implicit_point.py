"""A point (y, v) of an implicit hypergradient with all that was measured there, and the solves that lead to a next."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import Linearization, outer_gradients
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._numerics.quasi_newton import Recycled
from bilevel._numerics.rows import safe_row_norms
from bilevel._result import Solved, Status
from bilevel.hypergrad.abstract_implicit import AbstractImplicit
from bilevel.hypergrad.implicit import solution
from bilevel.requirements.properties import START_ONLY, DoesNotApply

_FORCING = 1e-3  # the least relative residual of a Newton step: more is lost to the curvature that it neglects
_HALF = 0.5  # of the tolerance on |grad_y g|, for the linear system: the rest is for the curvature
_GAIN = 0.1  # what a Newton step must reduce |grad_y g| to, or the inner solver, which is made for that, takes over


@final
@dataclass(frozen=True, eq=False)
class ImplicitPoint:
    """An inner iterate y and a linear iterate v, and what is known there: nothing of it costs an oracle call again.

    Attributes:
        y: `(*tasks, q)`.
        at: g to first order at y.
        value: f there.
        fx: grad_x f `(p,)`.
        fy: grad_y f `(*tasks, q)`.
        v: where the linear system H v = grad_y f stands.
        h: the implicit gradient grad_x f - G v.
        r: grad_y f - H v, or its norms `(*tasks, 1)` where a solver has told no more.
    """

    y: Tensor
    at: Linearization
    value: Tensor
    fx: Tensor
    fy: Tensor
    v: Tensor
    h: Tensor
    r: Tensor


@final
@dataclass(frozen=True, eq=False)
class Solves:
    """Solves with the solvers of an implicit estimator, at one x.

    Each system is preconditioned by the products of those before, where the linear solver takes a preconditioner.
    """

    problem: FlatProblem
    x: Tensor
    estimator: AbstractImplicit
    recycled: Recycled

    def point(self, y: Tensor, at: Linearization, v: Tensor | None) -> ImplicitPoint:
        """The point (y, v): one gradient of f and one product with H and G; none at v = 0, which None is."""
        value, fx, fy = outer_gradients(self.problem, self.x, y)
        if v is None:
            return ImplicitPoint(y, at, value, fx, fy, torch.zeros_like(fy), fx, fy)
        return self.measured_anew(ImplicitPoint(y, at, value, fx, fy, v, fx, fy))

    def measured_anew(self, point: ImplicitPoint) -> ImplicitPoint:
        """The same point, its h and r by one product with H and G."""
        hv, gv = point.at.products(point.v)
        return replace(point, h=self._less(point.fx, gv), r=point.fy - hv)

    def corrected(self, point: ImplicitPoint, system: Solved) -> ImplicitPoint:
        """The point after its v was corrected by the solution of H s = r."""
        s = system.value
        h = self._less(point.h, point.at.cross(s))
        return replace(point, v=point.v + s, h=h, r=system.residual.unsqueeze(-1))

    def linear(self, at: Linearization, b: Tensor, tol: float, size: float, trusting: bool = False) -> Solved:
        """H s = b from zero to |b - H s| <= tol, where |b| = size."""
        accurate = self.estimator.linear.with_tolerance(tol, size, trusting)
        solver = self.estimator.linear if accurate is None else accurate
        preconditioned = solver.with_preconditioner(self.recycled)
        solver = solver if preconditioned is None else preconditioned
        system = solver.solve(self.recycled.watched(at.operator), b, None)
        self.problem.tally.linear_steps += system.steps
        return system

    def inner(self, y: Tensor, solver: AbstractInnerSolver) -> tuple[Solved, Linearization]:
        """The inner problem from y, and g to first order at its solution."""
        return solution(self.problem, self.x, y, solver, self.estimator.products)[:2]

    def newton(self, at: Linearization, tol: float) -> tuple[Solved, Linearization]:
        """Newton steps from where `at` was taken, by the linear solver, to |grad_y g| <= tol or until one gains little.

        A step that gains nothing is taken back.
        """
        norms, steps, gained = safe_row_norms(at.gradient), 0, True
        while gained and float(norms.max()) > tol:
            before, steps = float(norms.max()), steps + 1
            step = self.linear(at, at.gradient, max(_HALF * tol, _FORCING * before), before, trusting=True)
            there = self.estimator.products.linearize(self.problem, self.x, at.y - step.value)
            left = safe_row_norms(there.gradient)
            gained = float(left.max()) < _GAIN * before
            if float(left.max()) < before:
                at, norms = there, left
        ends = tuple(Status.successful if e <= tol else Status.max_steps for e in norms.reshape(-1).tolist())
        return Solved(at.y, ends, norms, steps), at

    def _less(self, h: Tensor, cross: Tensor | None) -> Tensor:
        if cross is None and self.problem.problem.init is not None:
            raise DoesNotApply(START_ONLY)
        return h if cross is None else h - cross
