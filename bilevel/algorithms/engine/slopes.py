"""First derivatives that methods of the value function are made of, and what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bilevel._calculus import grad, inner_gradient_in_x, total
from bilevel._flat import FlatProblem
from bilevel._numerics.rows import safe_row_norms
from bilevel._numerics.second_derivatives import explained
from bilevel._optimizer import AbstractOptimizer
from bilevel._result import Tally
from bilevel.algorithms.engine.direction import demand_row_step
from bilevel.algorithms.engine.steps import RowStep
from bilevel.algorithms.oracle import Oracle
from bilevel.arguments.ranges import POSITIVE, demand_ranges
from bilevel.requirements.properties import Property

Weight: TypeAlias = float | Callable[[int], float]  # or step -> weight

# Of methods that compare values of g at several y: first derivatives only.
REQUIRES = frozenset(
    {Property.stationary, Property.minimum, Property.smooth, Property.beyond_start, Property.outer_gradient}
)


def weight_at(weight: Weight, step: int) -> float:
    """The weight of a step."""
    return weight(step) if callable(weight) else weight


def demand_weight(loop: Any, weight: Weight) -> None:
    """Refuse a number that is no weight.

    Raises:
        ValueError: if it is not positive and finite.
    """
    if not callable(weight):
        demand_ranges(loop, None, weight=POSITIVE)


def demand_own_steps(loop: Any, **steps: RowStep | None) -> None:
    """Refuse steps that are none, each by its name; None: it is left open.

    Raises:
        ValueError: naming the one.
    """
    for name, step in steps.items():
        if isinstance(step, AbstractOptimizer) and step.needs_curvature:
            raise ValueError(
                f"`{type(loop).__name__}({name}={type(step).__name__}())` needs a step size: pass `step=...`."
            )
        if not isinstance(step, AbstractOptimizer):
            demand_row_step(loop, name, step)


def demand_in_g(oracle: Oracle, x: Tensor, y: Tensor) -> None:
    """Refuse a g without x, where y depends on x by its start alone; one gradient, not counted, where there is an init.

    Raises:
        DoesNotApply: if it is so.
    """
    if oracle.like.problem.init is not None:
        inner_gradient_in_x(oracle.problem().with_tally(Tally()), x, y)


def slope(problem: FlatProblem, x: Tensor, y: Tensor, of_g: float | Tensor, of_f: float | Tensor = 0.0) -> Tensor:
    """of_g grad_y g + of_f grad_y f `(*several, *tasks, q)`; each task's own f, and not the mean over tasks.

    Factors are numbers, or those of several runs on batches of their own `(runs, 1)`; so they are below.

    Cost: one gradient of g, and one of f unless `of_f` is zero, by one backward pass.
    """
    rows = y.shape[:-1].numel()
    problem.tally.gradients += rows
    with torch.enable_grad(), explained():
        y = y.detach().requires_grad_()
        one = problem.by_itself()
        value = _weighed(of_g, one.g(x, y))
        if not _is_zero(of_f):
            problem.tally.outer_gradients += rows
            value = value + _weighed(of_f, one.f_each(x, y))
        return problem.total(grad(value, y))[0]


def outer_slope(
    problem: FlatProblem, x: Tensor, y: Tensor, of_f: float | Tensor, of_g: float | Tensor
) -> tuple[Tensor, Tensor]:
    """f `(*several,)`, and of_f grad_x f + of_g grad_x g `(*several, p)`, both means over tasks.

    Cost: one gradient of g, and one of f unless `of_f` is zero (f is then not evaluated, and 0), by one backward pass.
    """
    rows = y.shape[:-1].numel()
    problem.tally.gradients += rows
    with torch.enable_grad(), explained():
        x, y = x.detach().requires_grad_(), y.detach()
        one = problem.by_itself()
        value = _weighed(of_g / (problem.tasks or 1), one.g(x, y))
        f = value.new_zeros(x.shape[:-1])
        if not _is_zero(of_f):
            problem.tally.outer_gradients += rows
            f = one.f(x, y)
            value = value + _weighed(of_f, f)
        f, slopes = problem.total(f.detach(), grad(value, x))
        return f, slopes


def _is_zero(factor: float | Tensor) -> bool:
    return not isinstance(factor, Tensor) and factor == 0


def _weighed(factor: float | Tensor, values: Tensor) -> Tensor:
    """factor times the sum of values `()`, or of several runs `(runs,)` with a factor for each `(runs, 1)`."""
    if isinstance(factor, Tensor):
        return total(factor.squeeze(-1) * values)
    return total(values) if factor == 1 else factor * total(values)


def arrival(outer: Tensor, *inner: Tensor, problem: FlatProblem | None = None) -> Tensor:
    """The norm `()` of a residual of x and of what its inner iterates move along, whose parts may be on other ranks."""
    if problem is not None and problem.sharded:
        return torch.hypot(outer.reshape(()), problem.row_norms(torch.cat([d.reshape(-1) for d in inner])))
    return safe_row_norms(torch.cat([outer.reshape(1), *(d.reshape(-1) for d in inner)]))
