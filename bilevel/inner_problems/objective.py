"""From a bilevel problem at a fixed x to the inner objective that solvers see."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._result import Report, Solved
from bilevel._tree import Tree


def inner_objective(problem: FlatProblem, x: Tensor, products: AbstractProducts | None = None) -> Objective:
    """g(x, .) for inner solvers, at x `(p,)` or at several `(k, p)`.

    Args:
        problem: the problem.
        x: the outer variable.
        products: how to linearize where the solver stops, and to evaluate gradients; None: not at all, and by autograd.
    """
    linearize = None if products is None else lambda y: products.linearize(problem, x, y)
    polytope = problem.polytope(x.detach())
    oracle = None if products is None else products.oracle(problem, x)
    return Objective(lambda y: problem.g(x, y), problem.tally, linearize, closed_form(problem, x), polytope, oracle)


def closed_form(problem: FlatProblem, x: Tensor) -> Callable[[Callable[..., Tree]], Tensor]:
    """How a user's map x -> y*(x) becomes one of vectors; see `ClosedForm`."""

    def apply(solution: Callable[..., Tree]) -> Tensor:
        def one(x: Tree, *data: object) -> Tensor:
            return problem.y.ravel(solution(x, *data), "ClosedForm(solution=...)(x)")

        if x.dim() == 1:
            return problem.map(one, "g", x)
        return torch.stack([problem.map(one, "g", row) for row in x])  # a user's map need not be vectorizable

    return apply


def report(part: str, solved: Solved, gradient: Tensor | None = None) -> Report:
    """How a solver ended, in words; `gradient` is what was measured at its solution, if it was again."""
    residual = solved.residual if gradient is None else torch.linalg.vector_norm(gradient, dim=-1)
    worst = float(residual.max()) if residual.numel() else 0.0
    return Report(part, solved.status, worst, solved.steps, solved.statuses if solved.value.dim() > 1 else ())


def refuse_constraints(problem: FlatProblem, estimator: str) -> None:
    """Refuse constraints on y, for estimators that assume grad_y g = 0 at the solution.

    Raises:
        ValueError: naming the estimator and what to use instead.
    """
    if problem.problem.constraints is not None:
        raise ValueError(
            f"`{estimator}` does not apply: y is constrained, so that grad_y g(x, y*) need not be zero. Use `KKT`,"
            f" which differentiates the optimality conditions with the constraints, or `ESJ` or `FiniteDifference`."
        )


def refuse_iterative(problem: FlatProblem, estimator: str) -> None:
    """Refuse a y that is declared to be no minimizer of g, for estimators that assume that it is one.

    Raises:
        ValueError: naming the estimator and what to use instead.
    """
    if problem.problem.iterative:
        raise ValueError(
            f"`{estimator}` does not apply: the problem is declared `iterative`: y is what so many steps make of their"
            f" start, not a minimizer of g. Use `ITD` or `ESJ`, which differentiate the steps."
        )


def demand_heeded(problem: FlatProblem, solver: AbstractInnerSolver, estimator: str) -> None:
    """Refuse an inner solver that would ignore the constraints on y.

    Raises:
        ValueError: naming the estimator, the solver and what to use instead.
    """
    if problem.problem.constraints is not None and not solver.heeds_constraints:
        raise ValueError(
            f"`{estimator}(inner=...)` must heed the constraints on y. Got `{type(solver).__name__}`, which ignores"
            f" them. Use `QuadraticProgram`."
        )
