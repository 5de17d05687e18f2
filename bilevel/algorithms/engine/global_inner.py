"""Global minimization of g(x, .) under its constraints: a linear program, or many local searches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.algorithms.engine.optimistic import Optimistic
from bilevel.algorithms.engine.programs import Program, in_numpy, values_and_rows
from bilevel.solvers._scipy import as_numpy, scipy_optimize

_FEASIBLE = 1e-8


@final
@dataclass(frozen=True, eq=False)
class InnerMinimum:
    """The least value of g that was found, where, and whether a linear program says that there is no less.

    Attributes:
        value: V(x); inf where no feasible y was found.
        y: `(q,)`.
        exact: whether it is the solution of a linear program.
    """

    value: float
    y: Tensor
    exact: bool


def is_linear(problem: Optimistic, x: Tensor, y: Tensor) -> bool:
    """Whether g and the constraints on y are affine in y, as far as their values at random points tell."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    ends = [y + torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) * (1 + y.abs()) for _ in range(4)]
    with torch.no_grad():
        for one, other in zip(ends[:2], ends[2:], strict=True):
            here, there, middle = (_all(problem, x, at) for at in (one, other, 0.3 * one + 0.7 * other))
            size = 1 + torch.stack([here.abs(), there.abs()]).amax()
            if not bool(((middle - 0.3 * here - 0.7 * there).abs() <= 1e-10 * size).all()):
                return False
    return True


def by_linear_program(problem: Optimistic, x: Tensor, like: Tensor) -> InnerMinimum:
    """V(x) by HiGHS, for functions that are affine in y; exact to its tolerances."""
    import numpy as np

    y = torch.zeros_like(like)
    values, rows = values_and_rows(lambda y: _all(problem, x, y), y)
    a, J = as_numpy(values), as_numpy(rows).reshape(rows.shape)
    k = len(as_numpy(problem.inner(x, y)[0]))
    found = scipy_optimize("ValueFunction").linprog(
        J[0],
        A_ub=J[1 : 1 + k] if k else None,
        b_ub=-a[1 : 1 + k] if k else None,
        A_eq=J[1 + k :] if len(a) > 1 + k else None,
        b_eq=-a[1 + k :] if len(a) > 1 + k else None,
        bounds=(None, None),
        method="highs-ds",
    )
    if found.status == 3:
        return InnerMinimum(-np.inf, like, exact=True)
    if not found.success:
        return InnerMinimum(np.inf, like, exact=found.status == 2)
    return InnerMinimum(float(found.fun + a[0]), torch.from_numpy(found.x).to(like), exact=True)


def by_multistart(
    problem: Optimistic, x: Tensor, near: Tensor, *, samples: int, searches: int, radius: float, seed: int
) -> InnerMinimum:
    """V(x) by local searches from the best of many points, and from those that are given: the best that was found.

    Args:
        problem: g and its constraints.
        x: `(p,)`.
        near: points to start from as well `(n, q)`; the first is the center of the samples.
        samples: how many points are drawn, half of them in a cube about the center, half of them about 0.
        searches: how many of all are searched from.
        radius: half the side of the cube, in units of max(1, |center|); scales from a hundredth of it on are drawn.
        seed: of the draws.
    """
    import numpy as np

    generator = torch.Generator(device="cpu").manual_seed(seed)
    q = near.shape[-1]
    cube = 2 * torch.rand(samples, q, generator=generator, dtype=torch.float64) - 1
    scale = radius * 10.0 ** (-2 * torch.rand(samples, 1, generator=generator, dtype=torch.float64))
    center = near[0].double()
    middle = torch.where(torch.arange(samples).unsqueeze(-1) % 2 == 0, center, torch.zeros_like(center))
    points = (middle + cube * scale * max(1.0, float(center.abs().max()))).to(near)
    points = torch.cat([near, points])
    with torch.no_grad():
        wide = x.expand(len(points), -1)
        g = problem.problem.g(wide, points)
        c, e = problem.inner(wide, points)
        violation = c.clamp_min(0).sum(-1) + e.abs().sum(-1)
    g = torch.where(g.isfinite(), g, torch.inf)
    violation = torch.where(violation.isfinite(), violation, torch.inf)
    feasible = violation <= _FEASIBLE  # these first, by value; then the others, by their distance
    rank = torch.where(feasible, g, torch.inf).argsort()[: 8 * searches]
    further = torch.where(feasible, torch.inf, violation).argsort()[: 8 * searches]
    rank = torch.cat([rank[: int(feasible.sum())], further])
    order = [*range(len(near)), *(int(i) for i in rank)]
    program = _program(problem, x, near[0])
    best, where, tried = np.inf, near[0], list[Tensor]()
    apart = 0.2 * float(points.std()) if len(points) > 1 else 0.0  # searches from one valley all end at its bottom
    for i in order:
        if len(tried) >= searches + len(near):
            break
        point = points[i]
        if i >= len(near) and any(float((point - other).abs().max()) < apart for other in tried):
            continue
        tried.append(point)
        z, value, left = program.solve(as_numpy(point), max_steps=60)
        if left <= _FEASIBLE and value < best:
            best, where = value, torch.from_numpy(z.copy()).to(near)
    return InnerMinimum(float(best), where, exact=False)


def _program(problem: Optimistic, x: Tensor, like: Tensor) -> Program:
    import numpy as np

    def function(y: Tensor) -> Tensor:
        c, e = problem.inner(x, y)
        return torch.cat([problem.problem.g(x, y).reshape(1), e, c])

    unbounded = np.full(like.numel(), np.inf)
    count = problem.inner(x, like)[1].numel()
    return Program(in_numpy(function, like), count, -unbounded, unbounded)


def _all(problem: Optimistic, x: Tensor, y: Tensor) -> Tensor:
    c, e = problem.inner(x, y)
    return torch.cat([problem.problem.g(x, y).reshape(1), c, e])
