"""Inner solutions that are as accurate as ill-conditioned problems need, where rounding lets them be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._result import Solved, Status
from bilevel._validate import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, demand_ranges


@final
@dataclass(frozen=True)
class SolvedOn(AbstractInnerSolver):
    """One solver, and another from where it ends if it fails; success is a residual of at most `enough`.

    Both aim below that. What names take where the condition number of H is large: their tolerance leaves an error of y
    of `enough` over the least curvature, and one that leaves less need not be reached, as rounding may be above it.

    Cost: that of the first, and of the other where the first does not reach its own tolerance.

    Args:
        first: the solver.
        other: what goes on where that fails, such as `Newton` after `LBFGS`; left out where g has no second derivative.
        enough: the tolerance that is promised.

    Example:
        >>> import torch
        >>> from bilevel.solvers import LBFGS, Newton
        >>> objective = Objective(lambda y: (y - 3).square().sum() / 2)
        >>> solver = SolvedOn(LBFGS(tol=1e-16, max_steps=1), Newton(tol=1e-12), enough=1e-6)
        >>> solver.solve(objective, torch.zeros(2, dtype=torch.float64)).status.name
        'successful'
    """

    first: AbstractInnerSolver
    other: AbstractInnerSolver
    enough: float

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, enough=AT_LEAST_0)

    @property
    def forgets_start(self) -> bool:
        return self.first.forgets_start

    def solve(self, objective: Objective, y0: Tensor) -> Solved:
        found = self.first.solve(objective, y0)
        if found.status.ok or found.status.lost:
            return found
        try:
            further = self.other.solve(objective, found.value)
        except NotImplementedError:
            return self._judged(found)
        if bool((further.residual < found.residual).all()):  # else what is returned would be of no solve
            ends = tuple(b if b.ok else a for a, b in zip(found.statuses, further.statuses, strict=True))
            found = Solved(further.value, ends, further.residual, found.steps + further.steps)
        return self._judged(found)

    def _judged(self, found: Solved) -> Solved:
        met = (found.residual <= self.enough).reshape(-1).tolist()
        ends = (Status.successful if ok else end for ok, end in zip(met, found.statuses, strict=True))
        return replace(found, statuses=tuple(ends))

    @property
    def tolerance(self) -> float | None:
        return self.enough or None

    def with_tolerance(self, tol: float) -> AbstractInnerSolver | None:
        return self.first.with_tolerance(tol)

    def with_steps(self, steps: int) -> AbstractInnerSolver | None:
        return self.first.with_steps(steps)
