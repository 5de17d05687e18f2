"""Approximate implicit differentiation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Exact, FiniteDifferences, Linearization, outer_gradients
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._linear import AbstractLinearSolver
from bilevel._numerics.quasi_newton import Pairs, Recycled
from bilevel._result import Report, Solved, Status, report
from bilevel._tree import Tree
from bilevel._validate import demand_types
from bilevel.certificates.accuracy import Accuracy, inner_tolerance, linear_tolerance
from bilevel.certificates.assumptions import moved
from bilevel.certificates.certificate import Constants
from bilevel.certificates.residuals import measured
from bilevel.certificates.theorems import bounded
from bilevel.hypergrad.implicit import solution
from bilevel.requirements.properties import START_ONLY, DoesNotApply, Property

_ATTEMPTS = 100  # of a certified estimate: mostly two to four are needed, more where solvers take few steps each
_INNER = 0.6  # of the target, which the inner solver aims at; the linear solver has what is left
_FORCING = 1e-3  # the least relative residual of a Newton step: more is lost to what it neglects
_GAIN = 0.1  # what a Newton step must reduce the inner residual to, or the inner solver takes over
_PAIRS = 20  # products that precondition the solves after them
_SLACK = 0.95  # of the target, for what changes while it is being met


@final
@dataclass(frozen=True)
class AID(AbstractEstimator):
    """AID: h = grad_x f - (d2g/dxdy) v with (d2g/dy2) v = grad_y f, at an approximate inner solution y.

    With another linear solver this is AID-CG, AID-Neumann, the dense implicit gradient, and so on. Where y solves
    another condition F(x, y) = 0 than grad_y g = 0 (constraints on y, a non-smooth term), it is h = grad_x f -
    (dF/dx)' v with (dF/dy)' v = grad_y f in the unknowns of that kind of inner problem, by a linear solver that its
    declared properties admit: `CG` where it is positive definite, `MINRES` where it is symmetric, `GMRES` for
    anything.

    Cost: the inner solver's D gradients and one more, one gradient of f, the linear solver's N Hessian products
    and one for its true residual (one more for a warm start), one cross product. Memory O(q): it does not grow
    with the inner steps.

    Error: with d = y - y*, r = grad_y f - H v and J = dy*/dx, exactly (d2f/dxdy) d + J'((d2f/dy2) d - r) where f
    and g are quadratic; in general first order in |d| and |r|. With damping the system solved is another one, and
    the bias is O(damping / mu).

    Source: Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016, algorithm 1; Ji, Yang,
    Liang, "Bilevel optimization: convergence analysis and enhanced design", ICML 2021, equation (3).

    Args:
        inner: finds y*(x).
        linear: solves the linear system.
        damping: solve with H + damping I instead of H.
        products: how second derivatives are formed: `Exact()`, or `FiniteDifferences()` where g has operations
            without a second derivative, `CompiledProducts()` for small networks.
        target_error: solve both problems until the certified error of the hypergradient, `Estimate.bound`, is at most
            this, instead of to the tolerances of the solvers. Near a warm start y is corrected by Newton steps with the
            linear solver, and by the inner solver where these gain little. A linear solver that takes a
            preconditioner and has none is preconditioned by the last 20 products, for 40 q of memory.
        relative_error: the same, relative to |h|: below 1 it certifies a descent direction. With both, the larger
            target counts.
        constants: what is known of f and g, or a function of x that tells; for the certified error. None: estimated at
            the start, which makes the bound a heuristic.
        margin: the relative distance from a kink of y*(x), where a bound or a support changes, below which it is
            reported as `Status.weakly_active`; None: 1e-10, or 1e-6 in float32.

    Raises:
        ValueError: from `estimate`, if bounds on y are active that the problem does not know of, or if y depends on x
            only through its start (`init=`): the implicit function theorem does not see the start; use `ITD` or `ESJ`.

    Example:
        >>> import torch
        >>> from bilevel import AID, BilevelProblem, hypergradient
        >>> from bilevel.solvers import CG, LBFGS
        >>> problem = BilevelProblem(lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2)
        >>> aid = AID(inner=LBFGS(tol=1e-8), linear=CG(rtol=1e-8))
        >>> hypergradient(problem, torch.ones(2), torch.zeros(2), estimator=aid).grad
        tensor([-2., -2.])
    """

    inner: AbstractInnerSolver
    linear: AbstractLinearSolver
    damping: float = 0.0
    products: AbstractProducts = Exact()
    target_error: float | None = None
    relative_error: float | None = None
    constants: Constants | Callable[[Tree], Constants] | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        if not self.damping >= 0:
            raise ValueError(f"`AID(damping=...)` must be at least 0. Got {self.damping}.")
        if self.margin is not None and not self.margin >= 0:
            raise ValueError(f"`AID(margin=...)` must be at least 0, or None. Got {self.margin}.")
        if self.target_error is not None or self.relative_error is not None:
            self._accuracy()
            if self.damping:
                raise ValueError(
                    "`AID(target_error=...)` needs damping = 0: a damped system is biased by an unknown amount."
                )
            if not isinstance(self.products, Exact):
                raise ValueError(
                    "`AID(target_error=...)` needs `Exact()` products, whose errors are those of rounding only."
                    " Leave out `products=`."
                )

    def _accuracy(self) -> Accuracy:
        return Accuracy(self.constants, self.target_error or 0.0, self.relative_error or 0.0)

    @property
    def takes_encoding(self) -> bool:
        return self.target_error is None and self.relative_error is None  # a certificate is of the error in x

    @property
    def requires(self) -> frozenset[Property]:
        needed = frozenset({Property.stationary, Property.second_derivatives, Property.beyond_start})
        if self.target_error is not None or self.relative_error is not None:
            return needed | {Property.smooth}  # what certificates are of
        return needed - {Property.second_derivatives} if isinstance(self.products, FiniteDifferences) else needed

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        if self.target_error is not None or self.relative_error is not None:
            return self._certified(problem, x, start, self._accuracy())
        y0 = problem.start(x, start.y).detach()
        solved, at, ended = solution(problem, x, y0, self.inner, self.products, self.margin)
        y = solved.value
        value, fx, fy = outer_gradients(problem, x, y)
        system = self._solve(problem, at, at.right_hand_side(fy), start.v, self.linear)
        v = system.value
        cross = at.cross(v, fy)
        h = fx if cross is None else fx - cross
        reports = (ended, *at.reports, report("linear solver", system))
        return FlatEstimate(h, value, y, reports, v if v.shape == y.shape else None)

    def _inner(
        self, problem: FlatProblem, x: Tensor, y: Tensor, solver: AbstractInnerSolver
    ) -> tuple[Solved, Linearization]:
        return solution(problem, x, y, solver, self.products)[:2]

    def _solve(
        self,
        problem: FlatProblem,
        at: Linearization,
        fy: Tensor,
        guess: Tensor | None,
        linear: AbstractLinearSolver,
        recycled: Recycled | None = None,
    ) -> Solved:
        operator = at.operator.shifted(self.damping)
        if recycled is not None:
            preconditioned = linear.with_preconditioner(recycled)
            linear = linear if preconditioned is None else preconditioned
            operator = recycled.watched(operator)
        system = linear.solve(operator, fy, guess)
        problem.tally.linear_steps += system.steps
        return system

    @staticmethod
    def _hypergradient(problem: FlatProblem, fx: Tensor, cross: Tensor | None) -> Tensor:
        if cross is None and problem.problem.init is not None:
            raise DoesNotApply(START_ONLY)
        return fx if cross is None else fx - cross

    def _certified(self, problem: FlatProblem, x: Tensor, start: FlatStart, accuracy: Accuracy) -> FlatEstimate:
        """Solve whichever of the two systems keeps the bound above its target, to the tolerance that it needs.

        The bound itself costs nothing: its residuals are those that are at hand. Linear systems are solved for the
        correction of v, from the residual that is known, each preconditioned by the products of those before.
        """
        y = problem.start(x, start.y).detach()
        recycled = Recycled(Pairs(_PAIRS, y.reshape(-1, y.shape[-1])))
        rows, attempt, stuck, failed = y.shape[:-1].numel(), 0, False, False
        newton = start.v is not None  # near y*, where the linear solver is the faster one
        at = self.products.linearize(problem, x, y)
        known, anchor = accuracy.known(problem, x, y), y
        solved: Solved | None = None
        system: Solved | None = None
        value, fx, fy = outer_gradients(problem, x, y)
        v, h, r = self._from(problem, at, fx, fy, start.v)
        while True:
            here = moved(known, float(torch.linalg.vector_norm(y - anchor, dim=-1).max()))
            if here.mu is None or (here.C_G or 0.0) > 2 * (known.C_G or 0.0):  # what was measured is too far away
                known, anchor = accuracy.known(problem, x, y), y
                here = known
            found = measured(y, v, at.gradient, r, fx, fy, fx - h, here)
            terms, target = bounded(found, here), accuracy.target(torch.linalg.vector_norm(h))
            bound = terms.total + found.rounding
            valid = terms.distance <= here.radius
            if (bound <= target and valid) or failed or attempt == _ATTEMPTS or not math.isfinite(float(found.r.sum())):
                break
            attempt += 1
            guessed = start.v is not None or system is not None  # how large v and h are
            if guessed and not stuck and (terms.inner > target / 2 or not valid):
                before = float(torch.linalg.vector_norm(at.gradient, dim=-1).max())
                tol = min(inner_tolerance(_INNER * target, found, here), 0.5 * before, 0.5 * here.radius * terms.mu)
                inner = self.inner.with_tolerance(tol)
                newton = newton and inner is not None  # an exact inner solver needs no help
                at_floor = not newton
                if newton:
                    solved, at = self._newton(problem, x, at, tol, recycled)
                    newton = solved.status.ok
                else:
                    solved, at = self._inner(problem, x, y, self.inner if inner is None else inner)
                y = solved.value
                stuck = at_floor and not float(solved.residual.max()) < 0.9 * before  # at its rounding floor
                value, fx, fy = outer_gradients(problem, x, y)
                v, h, r = self._from(problem, at, fx, fy, v)
            else:
                if r.shape != fy.shape:  # its norm is known, but not itself
                    v, h, r = self._from(problem, at, fx, fy, v)
                size = float(torch.linalg.vector_norm(r, dim=-1).max())
                left, floor = _SLACK * target - terms.inner - found.rounding, terms.inner + found.rounding
                # Where the target is out of reach, as accurately as the rest of the bound makes sensible.
                last = guessed and (stuck or left <= 0)
                needed = linear_tolerance(max(left, 0.1 * floor), here) / rows
                tol = min(needed, 0.5 * size) if guessed else 0.1 * size
                system = self._solve(problem, at, r, None, self._accurate(tol, size), recycled)
                failed = last or not (system.status.ok or float(system.residual.max()) < 0.5 * size)
                v, h = v + system.value, self._hypergradient(problem, h, at.cross(system.value))
                r = system.residual.unsqueeze(-1)
        status = Status.successful if bound <= target and valid else Status.stagnated
        parts = (("inner solver", solved, at.gradient), ("linear solver", system, r))
        reports = [report(name, solution, left) for name, solution, left in parts if solution is not None]
        if status.ok:  # the target is met: what the solvers could not do was not needed
            reports = [replace(each, status=Status.successful) for each in reports]
        reports.append(Report("certified accuracy", status, bound, attempt))
        return FlatEstimate(h, value, y, tuple(reports), v, bound=bound if valid else math.inf)

    def _newton(
        self, problem: FlatProblem, x: Tensor, at: Linearization, tol: float, recycled: Recycled
    ) -> tuple[Solved, Linearization]:
        """Newton steps from where `at` was taken, by the linear solver, to |grad_y g| <= tol or until one gains little.

        A step that gains nothing is taken back.
        """
        norms, steps, gained = torch.linalg.vector_norm(at.gradient, dim=-1), 0, True
        while gained and float(norms.max()) > tol:
            before, steps = float(norms.max()), steps + 1
            solver = self._accurate(max(0.5 * tol, _FORCING * before), before, trusting=True)
            step = self._solve(problem, at, at.gradient, None, solver, recycled)
            there = self.products.linearize(problem, x, at.y - step.value)
            left = torch.linalg.vector_norm(there.gradient, dim=-1)
            gained = float(left.max()) < _GAIN * before
            if float(left.max()) < before:
                at, norms = there, left
        ends = tuple(Status.successful if e <= tol else Status.max_steps for e in norms.reshape(-1).tolist())
        return Solved(at.y, ends, norms, steps), at

    def _accurate(self, tol: float, size: float, trusting: bool = False) -> AbstractLinearSolver:
        accurate = self.linear.with_tolerance(tol, size, trusting)
        return self.linear if accurate is None else accurate

    def _from(
        self, problem: FlatProblem, at: Linearization, fx: Tensor, fy: Tensor, v: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """v, the implicit gradient fx - G v, and the residual fy - H v; at v = 0 without a product."""
        if v is None:
            return torch.zeros_like(fy), fx, fy
        hv, gv = at.products(v)
        return v, self._hypergradient(problem, fx, gv), fy - hv
