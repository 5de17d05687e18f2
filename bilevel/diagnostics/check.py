"""Is a problem well posed: plain verdicts, each with a remedy."""

from __future__ import annotations

from typing import Any

from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._problem import BilevelProblem, check_signature
from bilevel._result import Tally
from bilevel._tree import Tree, ravel
from bilevel.diagnostics.checker import Checker
from bilevel.diagnostics.verdict import Check


def check(
    problem: BilevelProblem,
    x: Tree,
    y0: Tree,
    *,
    data: Any = None,
    inner: AbstractInnerSolver | None = None,
    seed: int = 0,
) -> Check:
    """Test whether min_x f(x, argmin_y g(x, y)) is well posed near x, and which estimators apply to it.

    Values and dtypes; whether f and g give the same value twice; Taylor remainders of f and g in x and y, and of
    grad_y g, which vanish like t^2 where a function is smooth and its derivative right; second derivatives: whether
    torch has them, and the symmetry of the Hessian; how far the inner solver gets; the sign of the curvature there and
    its condition number; whether y depends on x, and by which way; the scales of x and y; and, where all of that is
    sound, the implicit gradient against a difference of Phi along a random direction.

    Cost: two or three inner solves, some 60 evaluations of f and g, q Hessian products for q <= 200 and some 30 above.

    Args:
        problem: f and g.
        x: a typical outer point.
        y0: where the inner solver starts.
        data: the third argument of f and g, if they take one.
        inner: the inner solver; by default accurate L-BFGS.
        seed: of the random directions.

    Returns:
        The verdicts. Nothing is raised for what is wrong with the problem.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if x, y0 and data do not fit together.

    Example:
        >>> import torch
        >>> problem = BilevelProblem(lambda x, y: (y - 3).square().sum(), lambda x, y: (y - x).square().sum())
        >>> check(problem, torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)).ok
        True
    """
    check_signature(problem, data)
    x_vector, x_structure = ravel(x, "x")
    y_vector, y_structure = ravel(y0, "y0")
    flat = FlatProblem(problem, x_structure, y_structure, data, Tally())
    return Checker(flat, x_vector.detach().clone(), y_vector.detach().clone(), inner, seed).run()
