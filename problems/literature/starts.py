"""Where runs on the test problems start: one rule for all of them, which knows nothing of their solutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev
from torch.quasirandom import SobolEngine

from bilevel.problems.literature.statement import Functions, Statement

WIDTH = 20.0  # of an interval that the problem does not bound on both sides


def starts(statement: Statement, count: int, *, seed: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Points of a scrambled Sobol sequence in a box.

    The box of an entry of x or y is what its bounds say: the constraints, outer or inner, that are affine and contain
    no other entry. Where one bound is missing the box is `WIDTH` long from the other; where both are, it is
    [-WIDTH / 2, WIDTH / 2].

    Args:
        statement: the problem.
        count: how many points.
        seed: of the scrambling. The first points of the same seed are the same whatever the count is.

    Returns:
        x `(p,)` and y `(q,)` of each, float64.
    """
    lower, upper = box(statement)
    p = statement.sizes[0]
    unit = sobol(len(lower), count, seed)
    return tuple((point[:p].clone(), point[p:].clone()) for point in lower + unit * (upper - lower))


def sobol(n: int, count: int, seed: int) -> Tensor:
    """Points of a scrambled Sobol sequence in the unit cube, float64 `(count, n)`."""
    engine: Any = SobolEngine
    points: Tensor = engine(n, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return points


def box(statement: Statement) -> tuple[Tensor, Tensor]:
    """The box of the starts, of x and y in one vector `(p + q,)`."""
    lower, upper = bounds(statement)
    low = torch.where(lower.isfinite(), lower, torch.where(upper.isfinite(), upper - WIDTH, -WIDTH / 2))
    high = torch.where(upper.isfinite(), upper, torch.where(lower.isfinite(), lower + WIDTH, WIDTH / 2))
    return low, high


def bounds(statement: Statement) -> tuple[Tensor, Tensor]:
    """The bounds of x and y that constraints state, infinite where there are none: `(p + q,)` each."""
    p, q = statement.sizes
    lower = torch.full((p + q,), -torch.inf, dtype=torch.float64)
    upper = -lower
    for functions in (statement.outer, statement.inner):
        for entry, bound, is_upper in [] if functions is None else _bounds(functions, p, q):
            if is_upper:
                upper[entry] = min(float(upper[entry]), bound)
            else:
                lower[entry] = max(float(lower[entry]), bound)
    return lower, upper


def _bounds(functions: Functions, p: int, q: int) -> list[tuple[int, float, bool]]:
    """(entry, bound, whether it is an upper one) of the constraints a z_i + c <= 0."""

    def values(z: Tensor) -> Tensor:
        return torch.stack(functions(z[:p], z[p:]))

    derivative: Callable[[Tensor], Tensor] = jacrev(values)
    probes = [torch.linspace(low, high, p + q, dtype=torch.float64) for low, high in ((0.3, 0.8), (-1.7, 2.9))]
    gradients = [derivative(probe) for probe in probes]
    found = []
    for row, other, value in zip(gradients[0], gradients[1], values(probes[0]), strict=True):
        entries = row.nonzero().flatten().tolist()
        if len(entries) == 1 and torch.equal(row, other):
            entry, slope = entries[0], row[entries[0]]
            found.append((entry, float(probes[0][entry] - value / slope), bool(slope > 0)))
    return found
