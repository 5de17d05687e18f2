"""HOAG: descent along implicit gradients whose tolerances fall from step to step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel._calculus import AbstractProducts, Exact, outer_gradients
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._linear import AbstractLinearSolver
from bilevel._numerics.rows import safe_row_norms
from bilevel._optimizer import AbstractMinimizer, AbstractOptimizer
from bilevel._result import report
from bilevel.algorithms.descent import Descent
from bilevel.algorithms.engine.steps import Step
from bilevel.algorithms.schedule import Power
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, POSITIVE, demand_ranges
from bilevel.hypergrad.implicit import solution
from bilevel.requirements.properties import Property


@checked(outer_step=POSITIVE, first_tolerance=POSITIVE, floor=AT_LEAST_0)
def hoag(
    inner: AbstractInnerSolver,
    linear: AbstractLinearSolver,
    outer_step: Step | AbstractMinimizer,
    first_tolerance: float = 1e-3,
    schedule: Callable[[int], float] = Power(2.0),
    floor: float = 1e-12,
) -> Descent:
    """HOAG: x <- P(x - beta h_k), h_k = grad_x f - G v where |grad_y g| <= e_k and |H v - grad_y f| <= e_k.

    Both solutions go on from those of the step before. With d = |y - y*| <= e_k / mu the error of h_k is of the order
    of e_k: where their sum is finite, x converges as it would along exact gradients, and the first steps, which need
    no accuracy, are cheap. `minimize(accuracy="adaptive")` chooses tolerances from what it measures instead.

    Cost: at each step what the two solvers take from the last solutions, one gradient of f and two products.

    Source: Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016, algorithm 1.

    Args:
        inner: for y; one that takes a tolerance.
        linear: for v; the same.
        outer_step: beta, an optimizer, or a minimizer.
        first_tolerance: e_0.
        schedule: step -> e_k / e_0; the published code has (k + 1)^-2, (k + 1)^-3 and 0.9^k.
        floor: the least e_k.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a number is out of range, or a solver takes no tolerance.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, minimize
        >>> from bilevel.solvers import CG, LBFGS
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> round(
        ...     float(
        ...         minimize(problem, x0, x0, algorithm=hoag(LBFGS(), CG(), 0.5), max_steps=50).x
        ...     ),
        ...     6,
        ... )
        3.0
    """
    from bilevel.solvers.gradient_descent import GradientDescent

    outer = outer_step if isinstance(outer_step, AbstractOptimizer | AbstractMinimizer) else GradientDescent(outer_step)
    return Descent(Tightening(inner, linear, first_tolerance, schedule, floor), outer, warm_start=True)


@final
@dataclass(frozen=True)
class Tightening(AbstractEstimator):
    """h = grad_x f - G v with |grad_y g| <= e_k and |H v - grad_y f| <= e_k, k the number of the estimate.

    Args:
        inner: for y.
        linear: for v.
        first_tolerance: e_0.
        schedule: k -> e_k / e_0.
        floor: the least e_k.
        products: with second derivatives.
    """

    inner: AbstractInnerSolver
    linear: AbstractLinearSolver
    first_tolerance: float
    schedule: Callable[[int], float]
    floor: float = 1e-12
    products: AbstractProducts = Exact()

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, first_tolerance=POSITIVE, floor=AT_LEAST_0)
        inner, linear = self.inner.with_tolerance(1.0), self.linear.with_tolerance(1.0, 1.0)
        for name, solver, found in (("inner", self.inner, inner), ("linear", self.linear, linear)):
            if found is None:
                raise ValueError(
                    f"`hoag({name}=...)` must be a solver that takes a tolerance. Got {type(solver).__name__}. Use"
                    f" `{'LBFGS()' if name == 'inner' else 'CG()'}`."
                )

    @property
    def requires(self) -> frozenset[Property]:
        second = {Property.second_derivatives} if isinstance(self.products, Exact) else set[Property]()
        return frozenset(
            {Property.stationary, Property.smooth, Property.beyond_start, Property.outer_gradient} | second
        )

    def tolerance(self, count: int) -> float:
        """e_k."""
        return max(self.floor, self.first_tolerance * self.schedule(count))

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        tolerance = self.tolerance(start.count)
        inner = self.inner.with_tolerance(tolerance)
        assert inner is not None
        solved, at, ended = solution(problem, x, problem.start(x, start.y).detach(), inner, self.products)
        y = solved.value
        value, fx, fy = outer_gradients(problem, x, y)
        linear = self.linear.with_tolerance(tolerance, float(safe_row_norms(fy).min()))
        assert linear is not None
        system = linear.solve(at.operator, fy, start.v)
        problem.tally.linear_steps += system.steps
        cross = at.cross(system.value)
        reports = (ended, *at.reports, report("linear solver", system))
        return FlatEstimate(fx if cross is None else fx - cross, value, y, reports, system.value)
