"""Whether f still falls, to first order, along a way that the optimality conditions of the inner problem leave open."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from bilevel.algorithms.engine.optimistic import Optimistic
from bilevel.algorithms.engine.programs import values_and_rows
from bilevel.solvers._scipy import as_numpy, scipy_optimize

if TYPE_CHECKING:
    import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"

_ACTIVE = 1e-5  # of a constraint of size 1: it may hold
_SETS = 10  # constraints that hold at most: their subsets are gone through
_STATIONARY = 1e-4  # of the gradients that cancel
# The least singular value of independent rows, in terms of max(1, the largest); violations are absolute.
_REGULAR = 1e-5


def descent_left(problem: Optimistic, x: Tensor, y: Tensor, limits: tuple[Array, Array], others: Tensor) -> float:
    """The largest -(f_x dx + f_y dy) over |dx|, |dy| <= 1, entry by entry, in terms of max(1, |grad f|); inf: unknown.

    Of the constraints on y that hold, let those in P have multipliers w >= 0 with grad_y g + J_P'w + J_e'nu = 0 and
    independent gradients. For each such P the direction has to satisfy, with some dw and dnu,

        d grad_y L(x, y, w, nu) = 0,  dc_P = 0,  dc_i <= 0 for the others that hold,  dw_i >= 0 where w_i = 0,  de = 0,
        dC <= 0 where C = 0,  dE = 0,  dx within its bounds,  dg(x, y) <= dV_k for other global minimizers y_k,

    a linear program. Where these cones are those of feasible curves, as under linear constraints and g quadratic in y,
    a point is a local minimum of first order (B-stationary) if and only if this is zero. Unknown where no P has
    multipliers, as without a constraint qualification, or where more than ten constraints hold.

    Cost: at most 2^k linear programs for k constraints that hold, mostly one.

    Args:
        problem: f, g and all constraints.
        x: `(p,)`.
        y: a minimizer of g(x, .), to about 1e-6.
        limits: bounds on x.
        others: rows of minimizers of g(x, .) that are not y, with dV_k/dx after each: `(n, q + p)`.
    """
    import numpy as np

    optimize = scipy_optimize("ValueFunction")
    p, q, z = x.numel(), y.numel(), torch.cat([x, y])
    k = problem.inner(x, y)[0].numel()

    def everything(z: Tensor) -> Tensor:
        x, y = z[:p], z[p:]
        return torch.cat([problem.problem.f(x, y).reshape(1), problem.problem.g(x, y).reshape(1), *problem.inner(x, y)])

    values, rows = (as_numpy(part) for part in values_and_rows(everything, z))
    outer, outer_rows = (
        as_numpy(part) for part in values_and_rows(lambda z: torch.cat(problem.outer(z[:p], z[p:])), z)
    )
    rows, outer_rows = rows.reshape(-1, p + q), outer_rows.reshape(-1, p + q)
    if not (np.isfinite(rows).all() and np.isfinite(outer_rows).all()):
        return math.inf
    f, g, c, e = rows[0], rows[1], rows[2 : 2 + k], rows[2 + k :]
    holds = np.flatnonzero(values[2 : 2 + k] >= -_ACTIVE * np.maximum(1, np.abs(c).max(1, initial=0)))
    if len(holds) > _SETS:
        return math.inf
    count = problem.outer(x, y)[0].numel()
    tight = outer[:count] >= -_ACTIVE * np.maximum(1, np.abs(outer_rows[:count]).max(1, initial=0))
    at, size = as_numpy(x), np.maximum(1, np.abs(as_numpy(x)))
    low = np.where(at <= limits[0] + _ACTIVE * size, 0.0, -1.0)
    high = np.where(at >= limits[1] - _ACTIVE * size, 0.0, 1.0)
    cuts = [np.concatenate([g[:p] - as_numpy(row[q:]), g[p:]]) for row in others]
    scale = max(1.0, float(np.abs(f).max()))
    worst, known = 0.0, False
    for chosen in _subsets(holds.tolist()):
        P = list(chosen)
        J = np.concatenate([c[P, p:], e[:, p:]])
        if len(J):
            sizes = np.linalg.svd(J, compute_uv=False)
            if len(J) > q or sizes[-1] <= _REGULAR * max(1.0, sizes[0]):
                continue
            w = np.linalg.lstsq(J.T, -g[p:], rcond=None)[0]
        else:
            w = np.zeros(0)
        left, floor = g[p:] + J.T @ w, _STATIONARY * max(1.0, float(np.abs(g[p:]).max(initial=0)))
        if np.abs(left).max(initial=0) > floor or (w[: len(P)] < -floor).any():
            continue
        known = True
        bend = _bend(problem, x, y, P, torch.from_numpy(w.copy()).to(x))
        loose = [i for i in holds.tolist() if i not in chosen]
        m, below = len(w), np.concatenate([c[loose], outer_rows[:count][tight], *(cut[None] for cut in cuts)])
        equal = np.concatenate([c[P], e, outer_rows[count:]])
        zero = w[: len(P)] <= floor
        sides = np.concatenate([np.where(zero, 0.0, -np.inf), np.full(m - len(P), -np.inf)])
        found = optimize.linprog(
            np.concatenate([f, np.zeros(m)]),
            A_ub=_wide(below, m) if len(below) else None,
            b_ub=np.zeros(len(below)) if len(below) else None,
            A_eq=np.concatenate([np.concatenate([bend, J.T], 1), _wide(equal, m)]),
            b_eq=np.zeros(q + len(equal)),
            bounds=np.stack(
                [np.concatenate([low, -np.ones(q), sides]), np.concatenate([high, np.ones(q), np.full(m, np.inf)])], 1
            ),
        )
        if found.status != 0:
            return math.inf
        worst = max(worst, -float(found.fun) / scale)
    return worst if known else math.inf


def _subsets(holds: list[int]) -> Iterator[tuple[int, ...]]:
    return chain.from_iterable(combinations(holds, n) for n in range(len(holds) + 1))


def _wide(rows: Array, more: int) -> Array:
    import numpy as np

    return np.concatenate([rows, np.zeros((len(rows), more))], 1)


def _bend(problem: Optimistic, x: Tensor, y: Tensor, P: list[int], w: Tensor) -> Array:
    """d/d(x, y) of grad_y L with these multipliers: `(q, p + q)`."""
    p, (c, e) = x.numel(), problem.inner(x, y)
    multipliers = torch.zeros_like(c)
    multipliers[P] = w[: len(P)]
    nu = w[len(P) :].reshape(e.shape)
    rows = values_and_rows(lambda z: problem.stationarity(z[:p], z[p:], multipliers, nu), torch.cat([x, y]))[1]
    found: Array = as_numpy(rows).reshape(rows.shape)
    return found
