"""Inner solutions along a path of outer variables, each from the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._numerics.transforms import demand_autograd
from bilevel._problem import BilevelProblem, check_signature
from bilevel._result import BilevelError, Status
from bilevel._tree import Tree, demand_alike, ravel
from bilevel.arguments.checked import checked
from bilevel.arguments.fits import demand_types
from bilevel.inner_problems.kinds import inner_objective
from bilevel.named.setting import Setting


@final
@dataclass(frozen=True, eq=False)
class SolutionPath:
    """What :func:`solution_path` returns.

    Attributes:
        x: the points, as they were given.
        y: the inner solution at each.
        values: Phi at each.
        statuses: how each inner solve ended.
        steps: inner steps at each.
    """

    x: tuple[Tree, ...]
    y: tuple[Tree, ...]
    values: tuple[float, ...]
    statuses: tuple[Status, ...]
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        demand_types(self)

    @property
    def best(self) -> int:
        """Which point has the least Phi."""
        return min(range(len(self.values)), key=self.values.__getitem__)


@checked()
def solution_path(
    problem: BilevelProblem,
    x: Sequence[Tree],
    y0: Tree,
    *,
    inner: AbstractInnerSolver | None = None,
    data: Any = None,
    throw: bool = True,
) -> SolutionPath:
    """y*(x) and Phi(x) at given points, one after the other, each solve from the solution before: a grid search.

    Order the points so that neighbors are close, such as penalties from the largest down.

    Cost: the inner solves and one value of f a point; no derivative in x.

    Args:
        problem: f and g.
        x: the points.
        y0: where the first solve starts.
        inner: the inner solver; None: that of a named estimator, as accurate as the dtype allows.
        data: the third argument of f and g, if they take one.
        throw: raise at the first solve that does not succeed; otherwise see `SolutionPath.statuses`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if there are no points, or structures differ.
        BilevelError: if `throw` and a solve did not succeed.

    Example:
        >>> from bilevel import BilevelProblem
        >>> from bilevel.prox import L1
        >>> a = torch.tensor([3.0, 1.0])
        >>> lasso = BilevelProblem(
        ...     lambda x, y: (y - 2).square().sum(),
        ...     lambda x, y: (y - a).square().sum() / 2,
        ...     prox=lambda x: L1(x),
        ... )
        >>> path = solution_path(lasso, [torch.tensor(2.0), torch.tensor(0.5)], torch.zeros(2))
        >>> [y.round(decimals=2).tolist() for y in path.y], path.best
        ([[1.0, 0.0], [2.5, 0.5]], 1)
    """
    demand_autograd("solution_path")
    points = tuple(x)
    if not points:
        raise ValueError("`solution_path(x=...)` must have at least one point. Got none.")
    check_signature(problem, data)
    start, y_structure = ravel(y0, "y0")
    _, x_structure = ravel(points[0], "x")
    demand_alike("solution_path(x, y0)", x_structure, y_structure)
    flat = FlatProblem(problem, x_structure, y_structure, data)
    y = flat.spread(start.detach())
    solutions, values, statuses, steps = list[Tree](), list[float](), list[Status](), list[int]()
    for each in points:
        at = x_structure.ravel(each, "x").detach()
        inner = Setting(flat, at, start).inner() if inner is None else inner
        solved = inner.solve(inner_objective(flat, at), flat.start(at, y).detach() if problem.init else y)
        y = solved.value
        if throw and not solved.status.ok:
            raise BilevelError(f"`solution_path`, point {len(values)}: {solved.status.value}", solved.status)
        with torch.no_grad():
            values.append(float(flat.f(at, y)))
        solutions.append(flat.y.unravel(y))
        statuses.append(solved.status)
        steps.append(solved.steps)
    return SolutionPath(points, tuple(solutions), tuple(values), tuple(statuses), tuple(steps))
