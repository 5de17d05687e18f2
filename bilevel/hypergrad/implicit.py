"""What implicit estimators share: the inner solution, and its optimality condition to first order."""

from __future__ import annotations

from torch import Tensor

from bilevel._calculus import AbstractProducts, Linearization
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._result import Report, Solved, report
from bilevel.inner_problems.kinds import inner_problem
from bilevel.requirements.properties import DoesNotApply


def solution(
    problem: FlatProblem,
    x: Tensor,
    y: Tensor,
    inner: AbstractInnerSolver,
    products: AbstractProducts,
    margin: float | None = None,
) -> tuple[Solved, Linearization, Report]:
    """y*(x) from the start y, the condition F(x, y) = 0 of this kind of inner problem there, and how the solver ended.

    The gradient that the solver ended with is not taken again: its graph was kept for the products.

    Raises:
        DoesNotApply: if the solver held entries of y by bounds of its own, or the inner problem has no such condition.
    """
    kind = inner_problem(problem.problem)
    objective = kind.objective(problem, x, products)
    solved = inner.solve(objective, y)
    if solved.at_bounds and objective.constraints is None and objective.nonlinear is None:
        raise DoesNotApply(
            f"{solved.at_bounds} entries of y are held by bounds, where grad_y g is not zero and the implicit function"
            f" theorem for unconstrained minima does not hold. Use `FiniteDifference`, give the bounds to the problem"
            f" as `constraints=`, or move them out of the way."
        )

    def smooth() -> Linearization:
        at = objective.linearization  # built where the solver stopped, if it asked for its last gradient
        known = at is not None and at.y.data_ptr() == solved.value.data_ptr()
        return at if at is not None and known else products.linearize(problem, x, solved.value)

    at = kind.linearize(problem, x, solved, smooth, margin)
    return solved, at, report("inner solver", solved, None if kind.features else at.gradient)
