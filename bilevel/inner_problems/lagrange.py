"""From multipliers of rows with slacks to those of the constraints as they were written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel._numerics.misfits import called
from bilevel._tree import Structure, Tree
from bilevel.inner_problems.multipliers import Multipliers
from bilevel.inner_problems.polytope import Polytope, lengths

if TYPE_CHECKING:
    from bilevel._flat import FlatProblem
    from bilevel.inner_problems.optimality import Optimality


def in_structures(
    problem: FlatProblem,
    x: Tensor,
    at: Optimality,
    constraints: Callable[..., Polytope] | None,
    own: tuple[tuple[Tensor, Structure | None], tuple[Tensor, Structure | None]] | None = None,
) -> Multipliers:
    """The multipliers at a solution.

    Args:
        problem: the problem in vectors.
        x: where.
        at: the optimality conditions, whose rows are equalities first, and inequalities of length one.
        constraints: `constraints(x) -> Polytope`; None: there is none.
        own: of nonlinear inequalities and equalities, with their structures; None: there are none.
    """
    (z, c), (nu, e) = own or ((at.y[..., :0], None), (at.y[..., :0], None))
    slack = at.activity.free[..., at.y.shape[-1] :]  # inequalities that do not hold with equality
    z = torch.where(slack[..., slack.shape[-1] - z.shape[-1] :], 0.0, z)
    found = Multipliers(
        inequalities=None if c is None else c.unravel(z), equalities=None if e is None else e.unravel(nu)
    )
    if constraints is None:
        return found

    def rows(x: Tree, *data: Any) -> Tensor:
        return lengths(called("constraints(x, data)", constraints, x, *data).parts(problem.y)[4])

    with torch.no_grad():  # of rows as they were written
        length = problem.map(rows, "g", x.detach())
    all_rows, q = at.activity.multipliers, at.y.shape[-1]
    slacks, k = at.force.shape[-1] - q, length.shape[-1]
    m = all_rows.shape[-1] - slacks - nu.shape[-1]
    gamma = all_rows[..., m + nu.shape[-1] : m + nu.shape[-1] + k] / length
    gamma = torch.where(slack[..., :k], 0.0, gamma)
    alpha = all_rows[..., :m]
    lower, upper = at.moving.lower[..., :q].detach(), at.moving.upper[..., :q].detach()
    force, held, high = at.force[..., :q], ~at.activity.free[..., :q], at.activity.upper[..., :q]
    fixed, push = lower >= upper, torch.where(held, force, torch.zeros_like(force))
    below = torch.where(fixed | ~high, push, 0.0).clamp_min(0)
    above = torch.where(fixed | high, -push, 0.0).clamp_min(0)
    return replace(
        found,
        linear_inequalities=gamma if k else None,
        linear_equalities=alpha if m else None,
        lower=problem.y.unravel(below) if bool(lower.isfinite().any()) else None,
        upper=problem.y.unravel(above) if bool(upper.isfinite().any()) else None,
    )
