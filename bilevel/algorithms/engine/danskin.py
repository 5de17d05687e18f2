"""Derivatives at a minimizer of g(x, .): its multipliers, and the slope of V(x) = min g(x, .)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from bilevel.algorithms.engine.optimistic import Optimistic
from bilevel.algorithms.engine.programs import values_and_rows
from bilevel.solvers._scipy import as_numpy, scipy_optimize

if TYPE_CHECKING:
    import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"


def danskin(problem: Optimistic, x: Tensor, y: Tensor) -> Tensor:
    """grad V(x) = grad_x (g + lambda'c + nu'e) at a minimizer y, with its multipliers; `(p,)`."""
    multipliers = torch.from_numpy(multipliers_at(problem, x, y)).to(x)
    with torch.enable_grad():
        leaf, own = x.detach().requires_grad_(), y.detach().requires_grad_()
        values = torch.cat(problem.inner(leaf, own))
        return gradients(problem.problem.g(leaf, own) + multipliers @ values, leaf, own)[0]


def gradients(value: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of a number in x and y; zeros where it does not depend on them."""
    if not value.requires_grad:
        return torch.zeros_like(x), torch.zeros_like(y)
    found = torch.autograd.grad(value, (x, y), allow_unused=True)
    gx, gy = (torch.zeros_like(at) if part is None else part for part, at in zip(found, (x, y), strict=True))
    return gx, gy


def multipliers_at(problem: Optimistic, x: Tensor, y: Tensor) -> Array:
    """lambda >= 0 of the inequalities that hold with equality, and nu: nearest to stationarity in y; `(k + m,)`."""
    import numpy as np

    (c, e), (_, rows) = problem.inner(x, y), values_and_rows(lambda y: torch.cat(problem.inner(x, y)), y)
    _, g = values_and_rows(lambda y: problem.problem.g(x, y).reshape(1), y)
    k, J = len(c), as_numpy(rows).reshape(rows.shape)
    found = np.zeros(k + len(e))
    active = np.flatnonzero(np.concatenate([as_numpy(c) >= -1e-6, np.full(len(e), True)]))
    if len(active) and np.isfinite(J).all() and bool(g.isfinite().all()):
        lower = np.where(active < k, 0.0, -np.inf)
        result = scipy_optimize("ValueFunction").lsq_linear(J[active].T, -as_numpy(g[0]), bounds=(lower, np.inf))
        found[active] = result.x
    return found
