"""Implicit differentiation of the whole optimality conditions, without an active set: a cross-check."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from bilevel._calculus import Exact, outer_gradients
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._linear import AbstractLinearSolver
from bilevel._result import report
from bilevel._validate import demand_types
from bilevel.hypergrad.implicit import solution
from bilevel.requirements.properties import Property
from bilevel.solvers.dense import Dense


@final
@dataclass(frozen=True)
class FullKKT(AbstractEstimator):
    """`KKT` by the whole system of the optimality conditions: no decision is made which constraints hold.

    With multipliers z and distances d of all inequalities and bounds, J their rows, and A those of equalities,

        F = (grad_y L, E, z d),  dF/d(y, nu, z) = [[L_yy, A', J'], [A, 0, 0], [z J, 0, -d]],

    K' v = (grad_y f, 0, 0) and h = grad_x f - (dF/dx)' v. Where strict complementarity holds, one of z and d is zero
    and h is that of `KKT`, from a matrix that is larger, not symmetric, and worse conditioned. It is there to check
    `KKT` by. Without constraints it is the dense implicit gradient.

    Cost: the inner solver's, and `Dense`: q + m + 2 k + n unknowns for k inequalities and n entries and slacks.

    Source: Amos, Kolter, "OptNet: differentiable optimization as a layer in neural networks", ICML 2017, equation (6).

    Args:
        inner: finds y*(x); one that heeds constraints.
        linear: solves a system without symmetry, `Dense` or `GMRES`.

    Raises:
        ValueError: from `estimate`, if there are constraints on y that the inner solver ignores.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, hypergradient
        >>> from bilevel.solvers import InteriorPoint
        >>> problem = BilevelProblem(
        ...     lambda x, y: y[0],
        ...     lambda x, y: (y - x).square().sum(),
        ...     inequalities=lambda x, y: y.square().sum() - 1,
        ... )
        >>> x, y0 = torch.tensor([3.0, 4.0]).double(), torch.zeros(2).double()
        >>> hypergradient(problem, x, y0, estimator=FullKKT(InteriorPoint())).grad.round(decimals=6)
        tensor([ 0.1280, -0.0960], dtype=torch.float64)
    """

    inner: AbstractInnerSolver
    linear: AbstractLinearSolver = Dense()

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def forgets_start(self) -> bool:
        return self.inner.forgets_start

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset(
            {Property.stationary, Property.second_derivatives, Property.beyond_start, Property.outer_gradient}
        )

    @property
    def takes_encoding(self) -> bool:
        return True

    @property
    def accurate(self) -> bool:
        return self.forgets_start and not self.linear.is_approximate

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        y0 = problem.start(x, start.y).detach()
        solved, reduced, ended = solution(problem, x, y0, self.inner, Exact())
        at = reduced if reduced.unreduced is None else reduced.unreduced()
        value, fx, fy = outer_gradients(problem, x, solved.value)
        system = self.linear.solve(at.operator, at.right_hand_side(fy), None)
        problem.tally.linear_steps += system.steps
        cross = at.cross(system.value, fy)
        h = fx if cross is None else fx - cross
        reports = (ended, *reduced.reports, report("linear solver", system))
        found = FlatEstimate(h, value, solved.value, reports, multipliers=reduced.multipliers)
        if reduced.second_order is not None:
            found = replace(found, reports=(*reports, reduced.second_order()))
        return found
