"""Where the estimates of a run start: at y0 each time, or where the one before ended."""

from __future__ import annotations

from bilevel._estimate import AbstractEstimator
from bilevel._problem import BilevelProblem
from bilevel.inner_problems.kinds import inner_problem
from bilevel.requirements.properties import Property


def starts_warm(asked: bool | None, estimator: AbstractEstimator, problem: BilevelProblem, *, run: bool = True) -> bool:
    """Whether each estimate of a run starts where the one before ended.

    A warm start saves work where y solves an equation and the estimator forgets its start. Anywhere else (so many steps
    without a tolerance, an inner problem that is an iteration) the start is a part of the function: Phi would have
    another value at each call for the same x. There it is warm only where that is asked for, which is known as online
    unrolling, or where the estimator declares that it is made for that (`AbstractEstimator.online`) and x is moved by
    the library itself.

    Args:
        asked: what the user says; None: nothing.
        estimator: what makes the estimates.
        problem: the problem.
        run: whether the estimates are those of one run of `minimize`, and not of a function that is called at any x.

    Example:
        >>> from bilevel.hypergrad import AID
        >>> from bilevel.solvers import CG, LBFGS
        >>> problem = BilevelProblem(lambda x, y: y, lambda x, y: (y - x) ** 2)
        >>> (
        ...     starts_warm(None, AID(LBFGS(tol=1e-8), CG()), problem),
        ...     starts_warm(None, AID(LBFGS(tol=0), CG()), problem),
        ... )
        (True, False)
    """
    if asked is not None:
        return asked
    if run and estimator.online:
        return True
    return estimator.forgets_start and Property.stationary in inner_problem(problem).offers
