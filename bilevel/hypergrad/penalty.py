"""The fully first-order value-function hypergradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import inner_gradient_in_x, outer_gradients
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._inner import AbstractInnerSolver, Objective
from bilevel._result import Report, report
from bilevel._validate import demand_types
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
from bilevel.bounds.value_function import penalty
from bilevel.inner_problems.kinds import inner_objective
from bilevel.requirements.properties import Property


@final
@dataclass(frozen=True)
class Penalty(AbstractEstimator):
    """Penalty: h_w = grad_x f(x, y_w) + w [grad_x g(x, y_w) - grad_x g(x, y*)], y_w = argmin_y f + w g.

    The gradient of min_y f + w (g - min_y g), which tends to Phi as the weight w grows; no second derivatives.
    Both inner problems are solved by the same solver, the second (as g + f / w, which has the same minimizer and
    keeps step sizes valid) from the solution of the first, and the first from that of the previous call.

    Cost: two inner solves (three with extrapolation), one gradient of f and one of g in x for each y.

    Error where f and g are quadratic: h_w - h = (d2f/dxdy + J' d2f/dy2)(y_w - y*), y_w - y* = -(d2f/dy2 + w H)^-1
    grad_y f(y*): O(1/w); with `extrapolate`, 2 h_2w - h_w: O(1/w^2). Inexact inner solutions add w times their
    distance, and rounding w times that of grad_x g, so that the best weight is finite; raising it further only adds
    noise. Needs w mu > the most negative curvature of f in y.

    Source: Kwon, Kwon, Wright, Nowak, "A fully first-order method for stochastic bilevel optimization", ICML 2023.

    Args:
        inner: solves both inner problems.
        weight: w.
        extrapolate: Richardson extrapolation in 1 / w.

    Raises:
        ValueError: if the weight is not positive; from `estimate`, if y depends on x only through its start.

    Example:
        >>> from bilevel import BilevelProblem, Penalty, hypergradient
        >>> from bilevel.solvers import LBFGS
        >>> problem = BilevelProblem(lambda x, y: (y - 3).square().sum() / 2, lambda x, y: (y - x).square().sum() / 2)
        >>> penalty = Penalty(LBFGS(tol=1e-10), weight=99.0)
        >>> x = torch.ones(1, dtype=torch.float64)
        >>> hypergradient(problem, x, torch.zeros_like(x), estimator=penalty).grad  # -2 * 99 / 100
        tensor([-1.9800], dtype=torch.float64)
    """

    inner: AbstractInnerSolver
    weight: float = 1e3
    extrapolate: bool = False

    def __post_init__(self) -> None:
        demand_types(self)
        if not self.weight > 0:
            raise ValueError(f"`Penalty(weight=...)` must be positive. Got {self.weight}.")

    @property
    def forgets_start(self) -> bool:
        return self.inner.forgets_start

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset(
            {Property.stationary, Property.minimum, Property.smooth, Property.beyond_start, Property.outer_gradient}
        )

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
        solved = self.inner.solve(inner_objective(problem, x), problem.start(x, start.y).detach())
        y = solved.value
        gx = inner_gradient_in_x(problem, x, y)
        value, _, _ = outer_gradients(problem, x, y)
        reports = [report("inner solver", solved)]
        h, y_w = self._at(problem, x, y, gx, self.weight, reports)
        penalized = None if self.extrapolate else (y_w, self.weight)
        if self.extrapolate:
            h = 2 * self._at(problem, x, y_w, gx, 2 * self.weight, reports)[0] - h
        return FlatEstimate(h, value, y, tuple(reports), penalized=penalized)

    def _at(
        self, problem: FlatProblem, x: Tensor, y: Tensor, gx: Tensor | None, w: float, reports: list[Report]
    ) -> tuple[Tensor, Tensor]:
        """h_w and y_w, solved from y; grad_x g(x, y*) is `gx`."""
        rows = y.shape[:-1].numel()

        def penalized(y: Tensor) -> Tensor:
            # The mean over tasks of f is undone, so that each row is its own task's f + w g.
            if torch.is_grad_enabled():
                problem.tally.outer_gradients += rows
            return problem.g(x, y) + problem.f_each(x, y) / w

        solved = self.inner.solve(Objective(penalized, problem.tally), y)
        reports.append(report(f"penalized inner solver (weight {w:g})", solved))
        y_w = solved.value
        _, fx, _ = outer_gradients(problem, x, y_w)
        at_w = inner_gradient_in_x(problem, x, y_w)
        if at_w is None or gx is None:
            return fx, y_w
        return fx + w / rows * (at_w - gx), y_w
