"""Approximate implicit differentiation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._accuracy import Accuracy, bound, inner_tolerance, linear_tolerance, with_tolerance
from bilevel._calculus import AbstractProducts, Exact, Linearization, outer_gradients
from bilevel._certificate import Constants
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._linear import AbstractLinearSolver
from bilevel._measure import measured
from bilevel._objective import inner_objective, report
from bilevel._result import Report, Solved, Status
from bilevel._tree import Tree

_ATTEMPTS = 20  # of a certified estimate: each at least halves the inner residual, mostly one or two are needed


@final
@dataclass(frozen=True)
class AID(AbstractEstimator):
    """AID: h = grad_x f - (d2g/dxdy) v with (d2g/dy2) v = grad_y f, at an approximate inner solution y.

    With another linear solver this is AID-CG, AID-Neumann, the dense implicit gradient, and so on.

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
            without a second derivative.
        target_error: solve both problems until the certified error of the hypergradient, `Estimate.bound`, is at most
            this, instead of to the tolerances of the solvers.
        relative_error: the same, relative to |h|: below 1 it certifies a descent direction. With both, the larger
            target counts.
        constants: what is known of f and g, or a function of x that tells; for the certified error. None: estimated at
            the start, which makes the bound a heuristic.

    Raises:
        ValueError: from `estimate`, if y depends on x only through its start (`init=`): the implicit function
            theorem does not see the start; use `ITD` or `ESJ`.

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

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError(f"`AID(damping=...)` must be at least 0. Got {self.damping}.")
        if self.target_error is not None or self.relative_error is not None:
            self._accuracy()
            if self.damping:
                raise ValueError(
                    "`AID(target_error=...)` needs damping = 0: a damped system is biased by an unknown amount."
                )

    def _accuracy(self) -> Accuracy:
        return Accuracy(self.constants, self.target_error or 0.0, self.relative_error or 0.0)

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        if self.target_error is not None or self.relative_error is not None:
            return self._certified(problem, x, start, self._accuracy())
        objective = inner_objective(problem, x, self.products)
        solved = self.inner.solve(objective, problem.start(x, start.y).detach())
        y = solved.value
        at = objective.linearization  # built where the solver stopped, if it asked for its last gradient
        if at is None or at.y.data_ptr() != y.data_ptr():
            at = self.products.linearize(problem, x, y)

        value, fx, fy = outer_gradients(problem, x, y)
        system = self._solve(problem, at, fy, start.v, self.linear)
        v = system.value
        h = self._hypergradient(problem, fx, at.cross(v))
        reports = (report("inner solver", solved, at.gradient), report("linear solver", system))
        return FlatEstimate(h, value, y, reports, v)

    def _solve(
        self, problem: FlatProblem, at: Linearization, fy: Tensor, guess: Tensor | None, linear: AbstractLinearSolver
    ) -> Solved:
        system = linear.solve(at.operator.shifted(self.damping), fy, guess)
        problem.tally.linear_steps += system.steps
        return system

    @staticmethod
    def _hypergradient(problem: FlatProblem, fx: Tensor, cross: Tensor | None) -> Tensor:
        if cross is None and problem.problem.init is not None:
            raise ValueError(
                "`AID` does not apply: g does not depend on x, so y depends on x only through its start `init(x)`,"
                " which the implicit function theorem does not see. Use `ITD` or `ESJ`, or add a term in x to g"
                " (iMAML: a proximal term)."
            )
        return fx if cross is None else fx - cross

    def _certified(self, problem: FlatProblem, x: Tensor, start: FlatStart, accuracy: Accuracy) -> FlatEstimate:
        """Solve whichever of the two systems keeps the bound above its target, to the tolerance that it needs.

        The bound itself costs nothing: its residuals are those that the solvers report.
        """
        y, v, linear_tol = problem.start(x, start.y).detach(), start.v, 0.0
        solved: Solved | None = None
        known: Constants | None = None
        for attempt in range(_ATTEMPTS):
            at = self.products.linearize(problem, x, y)
            value, fx, fy = outer_gradients(problem, x, y)
            known = accuracy.known(problem, x, y) if known is None else known
            size = float(torch.linalg.vector_norm(fy))
            while True:
                # The first system is solved roughly: its solution is only to tell how large v and h are.
                tol = linear_tol or 0.1 * size
                system = self._solve(problem, at, fy, v, with_tolerance(self.linear, tol, size))
                v, cross = system.value, at.cross(system.value)
                h = self._hypergradient(problem, fx, cross)
                found = measured(y, v, at.gradient, system.residual.unsqueeze(-1), fx, fy, cross, known.L or 0.0)
                terms, target = bound(found, known), accuracy.target(torch.linalg.vector_norm(h))
                needed = linear_tolerance(target, known)
                if terms.linear <= target / 2 or not system.status.ok or tol <= needed / 2:
                    break
                linear_tol = needed
            failed = not system.status.ok or (solved is not None and not solved.status.ok)
            if terms.total + found.rounding <= target or failed or attempt == _ATTEMPTS - 1:
                break
            tol = min(inner_tolerance(target, found, known), 0.5 * float(found.e.max()))
            solved = with_tolerance(self.inner, tol).solve(inner_objective(problem, x), y)
            y = solved.value
        reached = terms.total + found.rounding
        status = Status.successful if reached <= target else Status.stagnated
        reports = [] if solved is None else [report("inner solver", solved, at.gradient)]
        reports += [report("linear solver", system), Report("certified accuracy", status, reached, attempt)]
        return FlatEstimate(h, value, y, tuple(reports), v, bound=reached)
