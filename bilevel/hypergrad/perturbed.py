"""Inner solves at x and around it, all alike but for the point."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._numerics.batched import RANDOM, random_state, set_random_state
from bilevel._result import Solved
from bilevel.hypergrad.held import held
from bilevel.hypergrad.radius import refined
from bilevel.inner_problems.kinds import inner_objective


@final
class Perturbed:
    """y_N(x + r u_j) - y_N(x), a block of directions at a time; every block has its unperturbed solve beside it.

    Where the problem has an `encode`, that is called once at each point, without a graph, and the inner problem is
    solved as a function of z = encode(x): no step of a solve goes through `encode` again, and one perturbed x at a
    time is held.

    Args:
        problem: the problem in vectors.
        inner: the inner solver.
        x: the point `(p,)`.
        start: where y starts.
        radius: r.
    """

    def __init__(
        self, problem: FlatProblem, inner: AbstractInnerSolver, x: Tensor, start: Tensor, radius: float
    ) -> None:
        self.inner, self.x, self.radius = inner, x, radius
        self.y0 = problem.spread(start)
        with RANDOM:
            self.random = random_state(x)
            self.center, self.inside = encoded(problem, x)

    def moved(self, problem: FlatProblem, u: Tensor, radius: float | None = None) -> tuple[Tensor, Tensor, Solved]:
        """y_N(x), the differences for a block of directions `(k, p)`, and the verdict on its solves."""
        solved = self._solve(*self._points(problem, u, self.radius if radius is None else radius))
        # and not a view, which would hold all of them
        return solved.value[0].clone(), solved.value[1:] - solved.value[:1], solved

    def further(self, problem: FlatProblem, u: Tensor, y: Tensor, moved: Tensor, residual: float) -> Tensor | None:
        """The differences if no tolerance ended the solves; see `refined`."""
        if self.inner.with_tolerance(0.5) is None:
            return None
        seen, points = self._points(problem, u, self.radius)
        found = refined(seen, points, torch.cat([y.unsqueeze(0), y + moved]), residual, self.inner)
        return None if found is None else found[1:] - found[0]

    def _points(self, problem: FlatProblem, u: Tensor, radius: float) -> tuple[FlatProblem, Tensor]:
        """x and x + r u_j in rows, or their encodings, and the problem as a function of them."""
        if self.inside is None:
            return problem, self.x + radius * torch.cat([torch.zeros_like(u[:1]), u])
        around = []
        for row in u:
            with RANDOM:  # an encoding that draws random numbers draws those that it drew at x
                set_random_state(self.random)
                around.append(encoded(problem, torch.add(self.x, row, alpha=radius))[0])
        return self.inside.with_tally(problem.tally), torch.stack([self.center, *around])

    def _solve(self, problem: FlatProblem, points: Tensor) -> Solved:
        objective, y0 = inner_objective(problem, points), self.y0
        solved = self.inner.solve(  # of starts that are not named, so that the solver can let go of them
            objective,
            y0.expand(len(points), *y0.shape).clone()
            if problem.problem.init is None
            else problem.start(points, y0).detach(),
        )
        return held(objective, solved, self.inner.tolerance)


def encoded(problem: FlatProblem, x: Tensor) -> tuple[Tensor, FlatProblem | None]:
    """encode(x) for g, without a graph, and the problem as a function of it; x and None where there is no `encode`."""
    if problem.problem.encode is None or problem.is_encoded:
        return x, None
    with torch.no_grad():
        return problem.with_tally(problem.tally).encode(x, only_g=True)  # one that keeps no perturbed x


def joined(verdicts: list[Solved], y: Tensor) -> Solved:
    """The verdict on all blocks, of which the first holds y_N(x)."""
    return Solved(
        y,
        tuple(status for each in verdicts for status in each.statuses),
        torch.cat([each.residual.reshape(-1) for each in verdicts]),
        max(each.steps for each in verdicts),
    )
