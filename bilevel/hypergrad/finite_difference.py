"""Central differences of Phi: the oracle that other estimators are tested against."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver
from bilevel._result import Report, Status, Tally, report
from bilevel._validate import demand_types
from bilevel.arguments.ranges import POSITIVE, demand_ranges
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
from bilevel.bounds.differences import finite_difference
from bilevel.hypergrad.held import held
from bilevel.hypergrad.one_sided import FARTHER, one_sided
from bilevel.hypergrad.radius import DIGIT, refined
from bilevel.inner_problems.kinds import inner_objective
from bilevel.requirements.properties import Property

_UNSOLVED = 0.02  # of the first differences: by how much going on with the solves may change what others are tested by
_REFINED = 8  # of the coordinates: whether y follows x there is looked at in the first estimate of a run


@final
@dataclass(frozen=True)
class FiniteDifference(AbstractEstimator):
    """FiniteDifference: h_i = [Phi(x + t e_i) - Phi(x - t e_i)] / 2t, Phi(x) = f(x, y(x)) with y from the inner solver.

    Where the slopes to both sides differ, and keep differing at another distance, Phi has a kink, of which central
    differences make a mean: `Status.one_sided`. That is looked at in the first estimate of a run, and costs two inner
    solves more for each coordinate that gives reason to, which are not counted; so is, along up to 8 coordinates,
    whether they are others, by a fiftieth, where the solves go on for up to 50 steps: `Status.imprecise`.

    Cost: 2p + 1 inner solves, 2p + 1 values of f. No derivative of f or g beyond what the inner solver takes.

    Error: O(t^2) for smooth Phi plus (rounding and the inner solver's tolerance in Phi) / t; with the default step and
    an accurate inner solver about 1e-9 relative in float64. As the solver is part of Phi, this sees everything that
    it does, the start of the iteration included.

    Args:
        inner: solves the inner problem; to a tight tolerance, or in fixed steps.
        step: t is `step` times max(1, |x_i|); None is the cube root of the dtype's rounding unit.

    Raises:
        ValueError: if the step is not positive and finite. One so short that rounding takes all but a digit of the
            differences is reported as `Status.imprecise`.

    Example:
        >>> from bilevel import BilevelProblem, FiniteDifference, hypergradient
        >>> from bilevel.solvers import LBFGS
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
        ... )
        >>> x = torch.ones(1, dtype=torch.float64)
        >>> hypergradient(
        ...     problem, x, torch.zeros_like(x), estimator=FiniteDifference(LBFGS(tol=1e-10))
        ... ).grad
        tensor([-2.0000], dtype=torch.float64)
    """

    inner: AbstractInnerSolver
    step: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, step=POSITIVE)

    @property
    def forgets_start(self) -> bool:
        return False  # solves that begin alike end alike: over the step, what a tolerance leaves of them cancels

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset()

    def error_bound(self, about: Beforehand) -> Bound:
        if self.step is None or about.outer_size is None or about.third_derivative is None:
            raise ValueError(
                "`error_bound(FiniteDifference(...))` needs step, outer_size and third_derivative. Call"
                " `bounds.finite_difference` with the step that it derives."
            )
        return finite_difference(
            about.constants,
            step=self.step,
            outer_size=about.outer_size,
            third_derivative=about.third_derivative,
            distance=self.inner.solution_bound(about.constants, about.distance),
            outer_gradient_norm=about.outer_gradient_norm,
            value_error=about.value_error,
            reach=about.reach,
        )

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        value, y, first = self._phi(problem, x, start.y)
        moves, moved = list[Report](), list[tuple[Tensor, Tensor, Tensor]]()
        eps = float(torch.finfo(x.dtype).eps)
        step, distortion, noise = eps ** (1 / 3) if self.step is None else self.step, 0.0, 0.0
        h, kinks = torch.empty_like(x), list[float]()
        for i in range(x.shape[-1]):
            t = step * max(1.0, abs(float(x[i])))
            ends = []
            for sign in (1.0, -1.0):
                at = x.clone()
                at[i] += sign * t
                phi, there, ended = self._phi(problem, at, start.y)  # the same iteration: the same start
                ends.append((phi, at[i].clone()))
                moves.append(ended)
                if start.count == 0 and len(moved) < 2 * _REFINED:
                    moved.append((at, there, phi))
                del there
            (up, high), (down, low) = ends
            if start.count == 0:
                kinks += self._kink(problem, x, i, start.y, (float(down), float(value), float(up)), t)
            h[i] = (up - down) / (high - low)  # the distance as it was rounded
            distortion = max(distortion, abs(float(high - low) / (2 * t) - 1))
            noise = math.hypot(noise, eps * abs(float(value)) / t)
        # Near a stationary x the relative error grows at any step: only a step below a sensible one is blamed for it.
        unsolved = self._unresolved(problem, x, moved, moves) if start.count == 0 else 0.0
        lost = step < eps**0.5 and not noise <= DIGIT * float(torch.linalg.vector_norm(h))
        precise = distortion <= DIGIT and unsolved <= _UNSOLVED and not lost
        status, left = Status.successful if precise else Status.imprecise, max(distortion, noise, unsolved)
        reports: tuple[Report, ...] = (first, _worst(moves), Report("step", status, left, 0))
        if kinks:
            reports += (Report("slopes of Phi", Status.one_sided, max(kinks), 0),)
        return FlatEstimate(h, value, y, reports)

    def _kink(
        self, problem: FlatProblem, x: Tensor, i: int, y0: Tensor, values: tuple[float, float, float], t: float
    ) -> list[float]:
        """By how much the slopes of Phi along coordinate i differ, where it has a kink there."""
        down, here, up = values
        quiet = problem.with_tally(Tally())

        def farther() -> tuple[float, float]:
            e, far = torch.zeros_like(x), FARTHER * t
            e[i] = far
            ends = [float(self._phi(quiet, x + sign * e, y0)[0]) for sign in (1.0, -1.0)]
            return (ends[0] - here) / far, (here - ends[1]) / far

        right, left = (up - here) / t, (here - down) / t
        rounding = 100 * torch.finfo(x.dtype).eps * max(map(abs, values)) / t
        return [abs(right - left)] if one_sided(right, left, farther, rounding) else []

    def _unresolved(
        self, problem: FlatProblem, x: Tensor, moved: list[tuple[Tensor, Tensor, Tensor]], moves: list[Report]
    ) -> float:
        """By what part the first differences change as the solves of y go on.

        Relative to the largest of them, or of what they are by the movement of y alone, as both parts may cancel.
        """
        quiet = problem.with_tally(Tally())
        points, solutions = torch.stack([x for x, _, _ in moved]), torch.stack([y for _, y, _ in moved])
        found = refined(quiet, points, solutions, max(each.residual for each in moves), self.inner)
        if found is None:
            return 0.0
        with torch.no_grad():
            new, alone = (quiet.f(at, found) for at in (points, x.expand_as(points)))
        old = torch.stack([phi for _, _, phi in moved])
        before, after, implicit = (each[::2] - each[1::2] for each in (old, new, alone))
        size = float(torch.cat([after, implicit]).abs().max())
        return float((after - before).abs().max()) / size if size > 0 else 0.0

    def _phi(self, problem: FlatProblem, x: Tensor, y0: Tensor) -> tuple[Tensor, Tensor, Report]:
        objective = inner_objective(problem, x)
        solved = held(objective, self.inner.solve(objective, problem.start(x, y0).detach()), self.inner.tolerance)
        problem.tally.values += solved.value.shape[:-1].numel()
        with torch.no_grad():
            value = problem.f(x, solved.value)
        return value, solved.value, report("inner solver", solved)


def _worst(moves: list[Report]) -> Report:
    """The verdict on all inner solves at moved x: that of the worst."""
    status = Status.worst(each.status for each in moves)
    return replace(next(each for each in moves if each.status is status), part="inner solver at x +- t")
