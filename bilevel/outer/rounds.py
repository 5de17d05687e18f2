"""Constraints on x and y*(x) for outer methods that run their own loop: a run of it for each augmented Lagrangian."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel._estimate import FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._numerics.rows import safe_row_norms
from bilevel._optimizer import AbstractOuterDriver
from bilevel._result import Status
from bilevel.algorithms.augmented_f import Function, Lagrange, augmented
from bilevel.algorithms.oracle import Oracle
from bilevel.algorithms.outer_conditions import FAILED, STATIONARY, conditions, first_weight
from bilevel.algorithms.outer_constraints import OuterConstraints, outer_values
from bilevel.outer.batches import sources

Evaluate: TypeAlias = Callable[[Tensor], tuple[float, Tensor, Tensor, float]]
_GROWTH, _DECREASE, _MOST, _BOUND, _STEPS, _TOL = 10.0, 0.5, 1e12, 1e9, 100, 1e-6


@final
class _Arrived(Exception):  # noqa: N818  (how a loop that is somebody else's is left)
    def __init__(self, x: Tensor) -> None:
        Exception.__init__(self)
        self.x = x


@final
class Rounds:
    """What `AugmentedLagrangian` does, with its settings as they are there by default, around a driver.

    What is recorded, and kept in checkpoints, are f, the gradient of the augmented Lagrangian and y; its value, the
    multipliers and the weight follow from these, so that a resumed run finds them again as it is replayed.

    Args:
        driver: what minimizes an augmented Lagrangian.
        estimator: (problem, x, warm start) -> the estimate at x.
        inequalities: c, or None.
        equalities: e, or None.
        bounds: on x, or None.
    """

    def __init__(
        self,
        driver: AbstractOuterDriver,
        estimator: Callable[[FlatProblem, Tensor, FlatStart], FlatEstimate],
        inequalities: Function | None,
        equalities: Function | None,
        bounds: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.driver, self.estimator, self.bounds = driver, estimator, bounds
        self.inequalities, self.equalities = inequalities, equalities
        self.lagrange: Lagrange | None = None

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        """f at x, and the gradient of the present augmented Lagrangian."""
        at = self.lagrange
        found = self.estimator(problem if at is None else self._augmented(problem, at), x, start)
        with torch.no_grad():
            return replace(found, value=problem.f(x, found.y).detach())

    def told(self, problem: FlatProblem, x: Tensor, y: Tensor) -> OuterConstraints:
        """What is recorded of the constraints."""
        c, e = self._values(problem, x, y)
        return conditions(c, e, self.lagrange or _none(c, e))[3]

    def drive(
        self, evaluate: Evaluate, problem: FlatProblem, x: Tensor, max_steps: int, tol: float | None
    ) -> tuple[Tensor, Status]:
        """Minimize f under the constraints; evaluations are at most a few more than `max_steps`."""
        target, counted = _TOL if tol is None else tol, 0
        x = x if self.bounds is None else x.clamp(*self.bounds)
        value, _, y, measure = evaluate(x)
        c, e = self._values(problem, x, y)
        self.lagrange = at = replace(_none(c, e), weight=first_weight(value, c, e))
        omega, before, failed = max(0.5 * target, 0.1 * min(1.0, measure)), math.inf, 0
        used_up = Status.steps_used_up if tol is None else Status.max_steps
        if measure <= target:
            return x, Status.successful

        def lagrangian(x: Tensor) -> tuple[float, Tensor]:
            nonlocal counted
            counted += 1
            value, gradient, y, measure = evaluate(x)
            if measure <= target:
                raise _Arrived(x)
            c, e = self._values(problem, x, y)
            shifted = (at.inequalities + at.weight * c).clamp_min(0)
            term = (shifted.square().sum() - at.inequalities.square().sum()) / (2 * at.weight)
            term = term + (at.equalities * e).sum() + at.weight / 2 * e.square().sum()
            return value + float(term), gradient

        while counted < max_steps:
            steps = min(_STEPS, max_steps - counted)
            try:
                x, _ = self.driver.drive(lagrangian, x, bounds=self.bounds, max_steps=steps, tol=omega)
                _, _, y, measure = evaluate(x)
                if measure <= target:
                    return x, Status.successful
            except _Arrived as arrived:
                return arrived.x, Status.successful
            c, e = self._values(problem, x, y)
            raised, shifted, gap, told = conditions(c, e, at)
            failed = 0 if gap <= max(_DECREASE * before, 0.5 * target) else failed + 1
            if failed >= FAILED and told.violation > target and self._stuck(problem, x, y, c, e):
                return x, Status.infeasible_stationary
            weight = at.weight * (_GROWTH if failed else 1.0)
            if weight > _MOST:
                return x, Status.weight_limit
            at = Lagrange(raised.clamp_max(_BOUND), shifted.clamp(-_BOUND, _BOUND), weight)
            self.lagrange, before, omega = at, gap, max(0.5 * target, 0.1 * omega)
        return x, used_up

    def _stuck(self, problem: FlatProblem, x: Tensor, y: Tensor, c: Tensor, e: Tensor) -> bool:
        """Whether x is stationary for the violation."""
        violation = self._augmented(problem, replace(_none(c, e), weight=math.inf))
        slope = self.estimator(violation, x, FlatStart(y, None, 1)).grad
        left = slope if self.bounds is None else x - (x - slope).clamp(*self.bounds)
        size = safe_row_norms(torch.cat([c.clamp_min(0), e]))
        return bool(torch.linalg.vector_norm(left) <= STATIONARY * size)

    def _augmented(self, problem: FlatProblem, at: Lagrange) -> FlatProblem:
        found: Any = augmented(Oracle(problem, sources(None)), self.inequalities, self.equalities, at)
        made: FlatProblem = found.problem()
        return made

    def _values(self, problem: FlatProblem, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (
            outer_values(problem, self.inequalities, "outer_inequalities", x, y),
            outer_values(problem, self.equalities, "outer_equalities", x, y),
        )


def _none(c: Tensor, e: Tensor) -> Lagrange:
    return Lagrange(torch.zeros_like(c), torch.zeros_like(e), 0.0)
