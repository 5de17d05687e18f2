"""Approximate implicit differentiation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel._calculus import AbstractProducts, Exact, outer_gradients
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._linear import AbstractLinearSolver
from bilevel._objective import inner_objective, report


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

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError(f"`AID(damping=...)` must be at least 0. Got {self.damping}.")

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        objective = inner_objective(problem, x, self.products)
        solved = self.inner.solve(objective, problem.start(x, start.y).detach())
        y = solved.value
        at = objective.linearization  # built where the solver stopped, if it asked for its last gradient
        if at is None or at.y.data_ptr() != y.data_ptr():
            at = self.products.linearize(problem, x, y)

        value, fx, fy = outer_gradients(problem, x, y)
        system = self.linear.solve(at.operator.shifted(self.damping), fy, start.v)
        v = system.value
        problem.tally.linear_steps += system.steps
        cross = at.cross(v)
        if cross is None and problem.problem.init is not None:
            raise ValueError(
                "`AID` does not apply: g does not depend on x, so y depends on x only through its start `init(x)`,"
                " which the implicit function theorem does not see. Use `ITD` or `ESJ`, or add a term in x to g"
                " (iMAML: a proximal term)."
            )
        h = fx if cross is None else fx - cross
        reports = (report("inner solver", solved, at.gradient), report("linear solver", system))
        return FlatEstimate(h, value, y, reports, v)
