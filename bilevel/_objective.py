"""From a bilevel problem at a fixed x to the inner objective that solvers see."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts
from bilevel._flat import FlatProblem
from bilevel._inner import Objective
from bilevel._result import Report, Solved
from bilevel._tree import Tree


def inner_objective(problem: FlatProblem, x: Tensor, products: AbstractProducts | None = None) -> Objective:
    """g(x, .) for inner solvers, at x `(p,)` or at several `(k, p)`.

    Args:
        problem: the problem.
        x: the outer variable.
        products: how to linearize where the solver stops; None: not at all.
    """
    linearize = None if products is None else lambda y: products.linearize(problem, x, y)
    return Objective(lambda y: problem.g(x, y), problem.tally, linearize, closed_form(problem, x))


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
