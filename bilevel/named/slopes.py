"""Slopes of Phi to both sides along a line, by accurate inner solutions: what no derivative of g enters."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel.inner_problems.kinds import inner_objective, inner_problem
from bilevel.requirements.properties import Property

_NEARER = 8.0  # from one distance to the next
_UNEVEN = 0.05  # slopes to both sides that differ by less are one
_KEPT = 0.5  # of a difference of slopes, nearer by: what smooth functions lose seven eighths of
_SMALL = 1e-5  # of the gradient at another x: a residual that first-order corrections may be trusted with


@final
@dataclass(frozen=True)
class Slopes:
    """[Phi(x + t e) - Phi(x)] / t and [Phi(x) - Phi(x - t e)] / t at distances t that fall.

    Attributes:
        left: of the side of -e, at each distance.
        right: of the side of e.
    """

    left: tuple[float, ...]
    right: tuple[float, ...]

    @property
    def central(self) -> tuple[float, ...]:
        """The central differences."""
        return tuple((a + b) / 2 for a, b in zip(self.left, self.right, strict=True))

    def one_sided(self, floor: float) -> bool:
        """Whether the two sides keep differing, by more than a floor, as the distance falls: Phi has a kink.

        Example:
            >>> (
            ...     Slopes((-1.0, -1.0), (1.0, 1.0)).one_sided(1e-9),
            ...     Slopes((0.2, 0.275), (0.4, 0.3)).one_sided(1e-9),
            ... )
            (True, False)
        """
        gaps = [right - left for left, right in zip(self.left, self.right, strict=True)]
        size = max(map(abs, (self.left[0], self.right[0])))
        kept = [_KEPT < near / wide < 1 / _KEPT for wide, near in pairwise(gaps) if wide]
        return abs(gaps[0]) > max(_UNEVEN * size, floor) and bool(kept) and all(kept)

    def off(self, slope: float) -> float:
        """How far a slope is from the nearest of the central differences."""
        return min(abs(each - slope) for each in self.central)


def slopes(
    problem: FlatProblem,
    x: Tensor,
    y: Tensor,
    solver: AbstractInnerSolver,
    e: Tensor,
    v: Tensor | None,
    distances: int,
    *,
    from_start: bool = False,
) -> Slopes:
    """The slopes of Phi along e, from inner solutions on both sides that start at y.

    What is left of grad_y g there is taken into account to first order, Phi ~ f - <v, grad_y g>, where it is small and
    v, with H v = grad_y f, is known: at a kink of g it is neither.

    Args:
        problem: the problem, counting where it does not matter.
        x: where.
        y: y*(x), or the start of an iteration.
        solver: an accurate inner solver.
        e: a unit vector.
        v: the solution of the linear system at x, or None.
        distances: how many, from eps^(1/4) max(1, |x|) on, each an eighth of the one before.
        from_start: whether y is a start that is part of the problem, init(x) where there is one.
    """
    smooth = v is not None and {Property.stationary, Property.smooth} <= inner_problem(problem.problem).offers
    t = torch.finfo(x.dtype).eps ** 0.25 * max(1.0, float(torch.linalg.vector_norm(x)))
    apart = inner_objective(problem, x + t * e).gradient(y) if smooth else y

    def phi(x: Tensor) -> float:
        objective = inner_objective(problem, x)
        found = solver.solve(objective, problem.start(x, y).detach() if from_start else y).value
        with torch.no_grad():
            value = float(problem.f(x, found))
        if not smooth or v is None:
            return value
        left = objective.gradient(found)
        small = float(torch.linalg.vector_norm(left)) <= _SMALL * float(torch.linalg.vector_norm(apart)) / t
        return value - float((v * left).sum()) if small else value

    here, left, right = phi(x), [], []
    for _ in range(distances):
        right.append((phi(x + t * e) - here) / t)
        left.append((here - phi(x - t * e)) / t)
        t /= _NEARER
    return Slopes(tuple(left), tuple(right))
