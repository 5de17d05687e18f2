"""Which kind of inner problem a problem has: the one place that decides."""

from __future__ import annotations

from torch import Tensor

from bilevel._calculus import AbstractProducts
from bilevel._flat import FlatProblem
from bilevel._inner import Objective
from bilevel._problem import BilevelProblem
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_type
from bilevel.arguments.unchecked import unchecked
from bilevel.inner_problems.composite import Composite
from bilevel.inner_problems.constrained import LinearlyConstrained
from bilevel.inner_problems.fixed_point import FixedPoint
from bilevel.inner_problems.iteration import Iteration
from bilevel.inner_problems.kind import AbstractInnerProblem
from bilevel.inner_problems.nonlinearly_constrained import NonlinearlyConstrained
from bilevel.inner_problems.smooth import SmoothMinimization

_smooth = unchecked(SmoothMinimization)  # of a method of the problem


def inner_problem(problem: BilevelProblem) -> AbstractInnerProblem:
    """The kind of inner problem that was given as `inner=`, or follows from the other arguments of `problem`.

    Example:
        >>> type(
        ...     inner_problem(BilevelProblem(lambda x, y: y, lambda x, y: y * y, iterative=True))
        ... ).__name__
        'Iteration'
    """
    if not isinstance(problem, BilevelProblem):  # several times at every step: without what looks at annotations
        demand_type("inner_problem", "problem", problem, BilevelProblem)
    if isinstance(problem.inner, AbstractInnerProblem):
        return problem.inner
    if problem.fixed_point is not None:
        return FixedPoint(problem.fixed_point)
    if problem.iterative:
        return Iteration(objective_function=problem.g)
    if problem.inequalities is not None or problem.equalities is not None:
        return NonlinearlyConstrained(problem.g, problem.inequalities, problem.equalities, problem.constraints)
    if problem.constraints is not None:
        return LinearlyConstrained(problem.g, problem.constraints)
    if problem.prox is not None:
        return Composite(problem.g_as_given, problem.prox)
    return _smooth(problem.g)


@checked()
def inner_objective(problem: FlatProblem, x: Tensor, products: AbstractProducts | None = None) -> Objective:
    """What inner solvers are given at x `(p,)`, or at several `(k, p)`; see `AbstractInnerProblem.objective`."""
    return inner_problem(problem.problem).objective(problem, x, products)
