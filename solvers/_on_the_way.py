"""The largest curvature that a descent meets on its way, for step lengths that hold all along it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel._inner import Objective
from bilevel._numerics.rows import row_dots
from bilevel._result import Status

_ROUNDING = 1.01  # of a mean curvature, beyond that of the estimate of the largest one at a point
_GROWN = 1.01  # of a gradient from one step to the next, beyond rounding
_IDLE = 0.999  # of what it was half the way before
_LATELY = 100  # steps
_MOST_TRIALS = 200  # doublings in a row: more than from the least normal number to the largest


def curvature_on_the_way(
    objective: Objective, y0: Tensor, largest: Tensor, max_steps: int, tol: float, step_for_prox: bool = False
) -> Tensor:
    """L for each row `(*batch,)` with which gradient descent y <- y - grad g(y) / L descends from y0 to its end.

    A step d is taken if the mean curvature along it, d'(grad g(y + d) - grad g(y)) / |d|^2, is at most L, which is
    what the convergence of a step of 1 / L rests on; else L is doubled. At the end L is at least the largest curvature
    there. So it suits the whole way, where the curvature at y0 suits only a neighbourhood.

    Cost: one gradient a step, at most `max_steps` of them, and one for each doubling; some 10 to 20 Hessian products at
    the end. Rows are independent.

    Args:
        objective: g, and a proximal map where the steps are to heed it.
        y0: the start `(*batch, q)`.
        largest: L to begin with, positive: `(*batch,)`.
        max_steps: at most so many steps.
        tol: stop at gradients, or generalized gradients, no longer than this, or than rounding lets judge steps.
        step_for_prox: one L for all rows, as a proximal map takes it.
    """
    eps = torch.finfo(y0.dtype).eps
    L, y = largest.clone(), y0.detach().clone()
    gradient = objective.gradient(y)
    floor: Tensor | None = None
    steps = trials = 0
    while steps < max_steps and trials < _MOST_TRIALS:
        L = L.max().expand_as(L).clone() if step_for_prox else L
        d = _step(objective, y, gradient, L)
        norm = L * torch.linalg.vector_norm(d, dim=-1)
        floor = (eps**0.5 * norm).clamp_min(tol) if floor is None else floor
        going = (norm > floor) & norm.isfinite()
        if not bool(going.any()):
            break
        there = objective.gradient(y + d)
        met = row_dots(there - gradient, d) / row_dots(d, d)
        fits = met <= _ROUNDING * L  # not where it is NaN
        taken = (going & fits).unsqueeze(-1)
        y, gradient = torch.where(taken, y + d, y), torch.where(taken, there, gradient)
        L = torch.where(going & ~fits, 2 * L, L)
        moved = bool((going & fits).any())
        steps, trials = steps + moved, 0 if moved else trials + 1
    end = objective.largest_curvature(y)
    return torch.where(end > L, end, L)


def lost_its_way(status: Status, norms: Sequence[Tensor]) -> bool:
    """Whether a descent failed for want of shorter steps.

    It diverged; or it was still to end, and its gradients had grown from one step to the next, or had not declined for
    half of the way, as in a cycle. With steps of at most 1 / L, those of a convex function decline at every step.

    Args:
        status: how it ended.
        norms: of the gradients on its way, `(*batch,)` each; none: they were not looked at.
    """
    if status in (Status.nonfinite, Status.diverged):
        return True
    if status is not Status.max_steps or len(norms) < 2:
        return False
    table = torch.stack(tuple(norms))
    idle = table[-1] > _IDLE * table[(len(table) - 1) // 2]
    return bool((table[1:] > _GROWN * table[:-1]).any() | idle.any())


def is_time_to_give_up(norms: Sequence[Tensor]) -> bool:
    """Whether a descent that is still to end has lost its way lately; asked at every hundredth step."""
    return len(norms) > 0 and len(norms) % _LATELY == 0 and lost_its_way(Status.max_steps, norms[-_LATELY:])


def _step(objective: Objective, y: Tensor, gradient: Tensor, L: Tensor) -> Tensor:
    v = y - gradient / L.unsqueeze(-1)
    if objective.prox is None:
        return v - y
    with torch.no_grad():
        return objective.prox(v, 1 / float(L.max())) - y
