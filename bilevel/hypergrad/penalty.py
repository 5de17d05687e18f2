"""The fully first-order value-function hypergradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._result import Report, Status, report
from bilevel._validate import demand_types
from bilevel.arguments.ranges import POSITIVE, demand_ranges
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
from bilevel.bounds.value_function import penalty
from bilevel.hypergrad.penalty_error import PenaltyError, Point, error_of
from bilevel.hypergrad.penalty_term import penalty_with_term
from bilevel.inner_problems.kinds import inner_objective, inner_problem
from bilevel.requirements.properties import Property

_DIGIT = 0.1  # of h: where rounding and tolerances are more than that, hardly a digit is left


@final
@dataclass(frozen=True)
class Penalty(AbstractEstimator):
    """Penalty: h_w = grad_x f(x, y_w) + w [grad_x g(x, y_w) - grad_x g(x, y*)], y_w = argmin_y f + w g.

    The gradient of min_y f + w (g - min_y g), which tends to Phi as the weight w grows; no second derivatives.
    Both inner problems are solved by the same solver, the second (as g + f / w, which has the same minimizer and
    keeps step sizes valid) from the solution of the first, and the first from that of the previous call.

    Cost: two inner solves (three with extrapolation), one gradient of f and one of g in x for each y.
    Memory: 3 q + 2 p for each y (itself and the gradients at it, of which the bias is estimated), beside what a
    gradient takes, and at the first estimate of a run beside an inner solve. The result holds h, x, y and y_w.

    Error where f and g are quadratic: h_w - h = (d2f/dxdy + J' d2f/dy2)(y_w - y*), y_w - y* = -(d2f/dy2 + w H)^-1
    grad_y f(y*): O(1/w); with `extrapolate`, 2 h_2w - h_w: O(1/w^2). Inexact inner solutions add w times their
    distance, and rounding w times that of grad_x g, so that the best weight is finite; raising it further only adds
    noise. Needs w mu > the most negative curvature of f in y.

    The bias is estimated from the gradients at hand: h_w is the implicit gradient with a = w [grad_y g(y*) -
    grad_y g(y_w)] in the place of b = grad_y f(y*), and a - b is the residual of a linear system. At the first estimate
    of a run what becomes of it is measured, by an inner solve and two gradients of g more. `Status.imprecise` says that
    rounding, or what the inner solver left, times w is more than a tenth of h (more than `accuracy`, where there is
    one), and `Status.negative_curvature` that y is no minimum of g: g falls from y to y_w. Of a solver that takes the
    steps which were asked for, and has no tolerance, rounding alone is held against h.

    With a non-smooth term h_x both problems keep it, and grad_x g stands for the derivative of the least value of the
    inner problem: grad_x g at y, and that of the Moreau envelope of h_x at the v of its proximal step, with v held,
    which is d/dx h_x(y) where h has one, and right as well for sets whose size depends on x. Its bias is |h_2w - h_w|
    of the first estimate of a run, by one inner solve more, and its verdict that of rounding and residuals.

    Source: Kwon, Kwon, Wright, Nowak, "A fully first-order method for stochastic bilevel optimization", ICML 2023.

    Args:
        inner: solves both inner problems.
        weight: w.
        extrapolate: Richardson extrapolation in 1 / w.
        accuracy: the error, relative to the larger of |grad_x f| and |h - grad_x f|, above which an estimate does not
            succeed; None: the weight is what was asked for, and its bias is reported in `Estimate.bias`.

    Raises:
        ValueError: if the weight or the accuracy is not positive and finite; from `estimate`, if y depends on x only
            through its start.

    Example:
        >>> from bilevel import BilevelProblem, Penalty, hypergradient
        >>> from bilevel.solvers import LBFGS
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2
        ... )
        >>> penalty = Penalty(LBFGS(tol=1e-10), weight=99.0)
        >>> x = torch.ones(1, dtype=torch.float64)
        >>> hypergradient(problem, x, torch.zeros_like(x), estimator=penalty).grad  # -2 * 99 / 100
        tensor([-1.9800], dtype=torch.float64)
    """

    inner: AbstractInnerSolver
    weight: float = 1e3
    extrapolate: bool = False
    accuracy: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, weight=POSITIVE, accuracy=POSITIVE)

    @property
    def forgets_start(self) -> bool:
        return self.inner.forgets_start

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset({Property.stationary, Property.valued, Property.beyond_start, Property.outer_gradient})

    @property
    def takes_encoding(self) -> bool:
        return True

    def error_bound(self, about: Beforehand) -> Bound:
        known, w, b = about.constants, self.weight, about.outer_gradient_norm

        def bound(distance: float, penalized_distance: float) -> Bound:
            return penalty(
                known,
                weight=w,
                outer_gradient_norm=b,
                extrapolate=self.extrapolate,
                quadratic=about.quadratic,
                distance=distance,
                penalized_distance=penalized_distance,
            )

        exact = bound(0.0, 0.0)  # which also checks the constants
        assert known.mu is not None and known.L_fyy is not None
        negative = known.L_fyy if known.L_f_minus is None else known.L_f_minus
        reached = self.inner.solution_bound(known, about.distance)
        # The penalized problem is g + f / w: from the solution before it, with curvature between mu - L_f_minus / w
        # and L + L_fyy / w, which is also so, by a margin, for 2w.
        L = None if known.L is None else known.L + known.L_fyy / w
        shift = b / (w * known.mu - negative)
        penalized = replace(known, mu=known.mu - negative / w, L=L, radius=known.radius - shift)
        start = reached + shift  # |y~ - y_w|; for 2w: |y~_w - y_2w| <= |y~_w - y_w| + |y_w - y*| + |y* - y_2w|
        late = self.inner.solution_bound(penalized, start)
        if self.extrapolate:
            late = max(late, self.inner.solution_bound(penalized, late + 2 * shift))
        return exact if reached == late == 0 else bound(reached, late)

    def estimate(self, problem: FlatProblem, x: Tensor, start: FlatStart) -> FlatEstimate:
        if (term := inner_problem(problem.problem).term(problem)) is not None:
            weights = (self.weight, 2 * self.weight)
            accuracy = _DIGIT if self.accuracy is None else self.accuracy
            return penalty_with_term(problem, term, x, start, self.inner, weights, self.extrapolate, accuracy)
        solved = self.inner.solve(inner_objective(problem, x), problem.start(x, start.y).detach())
        y = Point.at(problem, x, solved.value)
        reports = [report("inner solver", solved)]
        points: list[tuple[float, Point]] = []
        for w in (self.weight, 2 * self.weight)[: 1 + self.extrapolate]:
            before = points[-1][1] if points else y
            points.append((w, self._penalized(problem, x, before.y, w, reports)))
        h = self._estimate(y, *points[0])
        if self.extrapolate:
            h = 2 * self._estimate(y, *points[1]) - h
        penalized = None if self.extrapolate else (points[0][1].y, self.weight)
        error = PenaltyError()
        if y.gx is not None and bool(h.isfinite().all()):  # else y does not move with x, or other reports say why
            error = error_of(problem, x, y, points, h, self.inner, start.count == 0)
        reports.append(self._verdict(error))
        bias = error.bias + error.noise + error.inexact
        return FlatEstimate(h, y.f, y.y, tuple(reports), penalized=penalized, bias=bias)

    @staticmethod
    def _estimate(y: Point, w: float, y_w: Point) -> Tensor:
        """h_w, from the gradients at y and at y_w."""
        if y.gx is None or y_w.gx is None:
            return y_w.fx
        return y_w.fx + w / y.y.shape[:-1].numel() * (y_w.gx - y.gx)

    def _penalized(self, problem: FlatProblem, x: Tensor, y: Tensor, w: float, reports: list[Report]) -> Point:
        """Y_w, solved from y."""
        rows = y.shape[:-1].numel()

        def penalized(y: Tensor) -> Tensor:
            # The mean over tasks of f is undone, so that each row is its own task's f + w g.
            if torch.is_grad_enabled():
                problem.tally.outer_gradients += rows
            return problem.g(x, y) + problem.f_each(x, y) / w

        solved = self.inner.solve(Objective(penalized, problem.tally), y)
        reports.append(report(f"penalized inner solver (weight {w:g})", solved))
        return Point.at(problem, x, solved.value)

    def _verdict(self, error: PenaltyError) -> Report:
        """What the error means: as a part of the larger of the two parts of h."""
        solves = self.inner.forgets_start or self.inner.tolerance is not None  # else steps were asked for
        noise = error.noise + (error.inexact if solves else error.rounded)
        share = 1 / error.size if error.size > 0 else math.inf if error.inexact > 0 else 0.0
        status = Status.successful
        if error.descends:
            status = Status.negative_curvature
        elif noise * share > (_DIGIT if self.accuracy is None else self.accuracy) and not error.settled:
            status = Status.imprecise
        elif self.accuracy is not None and error.bias * share > self.accuracy and not error.settled:
            status = Status.biased
        return Report("penalty", status, (error.bias + noise) * share, 0)
