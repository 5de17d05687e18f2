"""PBGD: descent on the outer objective plus a penalty on how far y is from optimal."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, final, get_args

import torch
from torch import Tensor

from bilevel._calculus import AbstractProducts, Exact, inner_gradient_in_x, inner_gradients
from bilevel._estimate import FlatEstimate
from bilevel._optimizer import OptimizerState
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.engine.direction import residual_report, rows_of_outer_gradients
from bilevel.algorithms.engine.slopes import (
    REQUIRES,
    Weight,
    arrival,
    demand_in_g,
    demand_own_steps,
    demand_weight,
    slope,
    weight_at,
)
from bilevel.algorithms.engine.steps import RowStep, Schedule, are_alike, begun, moved
from bilevel.algorithms.oracle import Draws, Oracle
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, demand_ranges
from bilevel.requirements.properties import START_ONLY, DoesNotApply, Property

Form: TypeAlias = Literal["value", "gradient"]


@final
@dataclass(frozen=True, eq=False)
class Penalized:
    """Everything that the rest of a run depends on.

    Attributes:
        x: `(p,)`.
        y: of the penalized problem `(*tasks, q)`.
        omega: of g alone; None: the form has no such iterate.
        outer: of the optimizer of x; None: x is stepped by a number.
        of_y: the same of y.
        of_omega: the same of omega.
    """

    x: Tensor
    y: Tensor
    omega: Tensor | None
    outer: OptimizerState | None = None
    of_y: OptimizerState | None = None
    of_omega: OptimizerState | None = None


@final
@dataclass(frozen=True, eq=False)
class _Found:
    """Directions, those of y and omega times the weight where their size is compared, and omega after its steps."""

    d_y: Tensor
    d_omega: Tensor
    weight: float
    omega: Tensor | None
    of_omega: OptimizerState | None


@final
@dataclass(frozen=True)
class PBGD(AbstractAlgorithm[Penalized]):
    """PBGD: (x, y) by gradient steps on f + weight p(x, y), p = g - min_y g (value) or |grad_y g|^2 / 2 (gradient).

    form="value" (V-PBGD): omega <- omega - rho grad_y g(x, omega), `inner_steps` times, warm-started, and then at once

        x <- P(x - gamma d_x),   d_x = grad_x f(x, y) + weight [grad_x g(x, y) - grad_x g(x, omega)]
        y <- y - rho d_y,        d_y = grad_y g(x, y) + grad_y f(x, y) / weight

    form="gradient" (G-PBGD), without omega and with products with second derivatives, H = d2g/dy2, G = d2g/dxdy:

        d_x = grad_x f + weight G grad_y g,   d_y = H grad_y g + grad_y f / weight

    with grad_y g from a batch independent of that of H and G, so that the products are unbiased. y is stepped along the
    penalized objective *over the weight*, so that rho fits g whatever the weight (the paper's one step length a for
    both is gamma = a, rho = a weight). omega takes a batch of its own for each step.

    With a fixed weight the value form has the limit of `F2SA` of order 1, x_w and y_w. Where f and g are quadratic,
    d_x is off grad Phi by (d2f/dxdy + J' C)(y - y*) at the limit of y, J = dy*/dx, C = d2f/dy2, b = grad_y f(x, y*),
    with y - y* = -(weight H + C)^-1 b (value), -(weight H^2 + C)^-1 b (gradient): O(1 / weight).

    `Estimate.y` is omega (value) or y (gradient); `Estimate.value` is f(x, y). `tol` is compared with
    |(d_x, weight d_y, weight grad_y g(x, omega))|, zero at a stationary point of the penalized problem.

    Cost: inner_steps + 4 calls (value), or 5 (gradient; 4 where the data are fixed) for each sample of a batch. Memory:
    one more y (value), or the graph of a gradient (gradient).

    Converges: where g(x, .) satisfies a Polyak-Lojasiewicz inequality, g not necessarily convex, and f is Lipschitz in
    y, with a weight of the order of e^-1/2 to an e-stationary point of the penalized problem in O(e^-3/2) full
    gradients up to logarithms. Batches leave noise of the order of the weight.

    Source: Shen, Chen, "On penalty-based bilevel gradient descent method", ICML 2023.

    Args:
        inner_step: rho, of y and omega, or an optimizer; below 2 / L (value), 2 / L^2 (gradient), L the largest
            eigenvalue of H.
        outer_step: gamma, of x, or an optimizer; below the reciprocal of the curvature of the penalized problem in x,
            which grows with the weight where y lags behind.
        weight: of the penalty, or step -> weight.
        inner_steps: of omega; only for the value form.
        form: "value" or "gradient".
        schedule: step -> the factor of all steps; None: constant.
        outer_schedule: the same of gamma alone, where it is another one.
        products: of the gradient form with second derivatives; `FiniteDifferences()` where there is no double backward.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step or the weight is not positive, `inner_steps` below 1, or there is no such form; from
            `minimize`, if y is constrained or no minimizer of g.

    Example:
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> solution = minimize(
        ...     problem, x0, x0, algorithm=PBGD(0.5, 0.02, weight=10.0), max_steps=600
        ... )
        >>> round(float(solution.x), 3)
        3.0
    """

    inner_step: RowStep
    outer_step: RowStep
    weight: Weight = 10.0
    inner_steps: int = 1
    form: Form = "value"
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None
    products: AbstractProducts = field(default_factory=Exact)

    def __post_init__(self) -> None:
        demand_types(self)
        demand_own_steps(self, inner_step=self.inner_step, outer_step=self.outer_step)
        demand_weight(self, self.weight)
        demand_ranges(self, inner_steps=AT_LEAST_1)
        if self.form not in get_args(Form):
            raise ValueError(f"`PBGD(form=...)` must be one of {', '.join(get_args(Form))}. Got {self.form!r}.")

    @property
    def requires(self) -> frozenset[Property]:
        second = self.form == "gradient" and isinstance(self.products, Exact)
        return REQUIRES | {Property.second_derivatives} if second else REQUIRES

    @property
    def draws(self) -> Draws:
        return Draws(f=1, g=self.inner_steps + 1 if self.form == "value" else 2)

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> Penalized:
        x = oracle.project(x)
        y = oracle.problem().start(x, y).detach()
        demand_in_g(oracle, x, y)
        state, outer = begun(self.inner_step, y), begun(self.outer_step, x)
        if self.form == "gradient":
            return Penalized(x, y, None, outer, state)
        return Penalized(x, y, y, outer, state, state)

    def evaluate(self, oracle: Oracle, state: Penalized) -> Evaluated:
        weight = weight_at(self.weight, oracle.step)
        h, value, found = (self._by_value if self.form == "value" else self._by_gradient)(oracle, state, weight)
        reports = [residual_report("penalized inner iterate", found.d_y)]
        if found.omega is not None:
            reports.append(residual_report("inner iterate", found.d_omega))
        best = state.y if found.omega is None else found.omega
        return Evaluated(FlatEstimate(h, value, best, tuple(reports)), found)

    def _by_value(self, oracle: Oracle, state: Penalized, weight: float) -> tuple[Tensor, Tensor, _Found]:
        """d_x, f, and the rest."""
        x, y, omega, of_omega = state.x, state.y, state.omega, state.of_omega
        assert omega is not None
        rho = 1.0 if self.schedule is None else self.schedule(oracle.step)
        d_omega = torch.zeros_like(omega)
        for number in range(1, self.inner_steps + 1):
            d_omega = slope(oracle.problem(g=number), x, omega, oracle.block("g", number).scale)
            omega, of_omega = moved(self.inner_step, rho, d_omega, omega, of_omega)
        problem, of_f, of_g = oracle.problem(), oracle.block("f").scale, oracle.block("g").scale
        tasks = problem.tasks or 1
        value, fx, fy = rows_of_outer_gradients(problem, x, y)
        _, gx, gy = inner_gradients(problem, x, y)
        gx_best = inner_gradient_in_x(problem, x, omega)
        h = of_f * fx
        if gx is not None and gx_best is not None:
            h = h + weight * of_g / tasks * (gx - gx_best)
        d_y = of_g * gy + of_f * tasks / weight * fy  # each task's own f
        return h, value, _Found(d_y, d_omega, weight, omega, of_omega)

    def _by_gradient(self, oracle: Oracle, state: Penalized, weight: float) -> tuple[Tensor, Tensor, _Found]:
        x, y = state.x, state.y
        problem, of_f, of_g = oracle.problem(), oracle.block("f").scale, oracle.block("g").scale
        tasks = problem.tasks or 1
        at = self.products.linearize(problem, x, y)
        if oracle.is_fixed:
            gy = at.gradient
        else:
            gy = slope(oracle.problem(g=1), x, y, oracle.block("g", 1).scale)
        hv, gv = at.products(gy)
        if gv is None and oracle.like.problem.init is not None:
            raise DoesNotApply(START_ONLY)
        value, fx, fy = rows_of_outer_gradients(problem, x, y)
        h = of_f * fx if gv is None else of_f * fx + weight * of_g / tasks * gv
        d_y = of_g * hv + of_f * tasks / weight * fy
        return h, value, _Found(d_y, torch.zeros_like(y), weight, None, None)

    def step(self, oracle: Oracle, state: Penalized, found: Evaluated) -> Penalized:
        kept: _Found = found.kept
        rho = 1.0 if self.schedule is None else self.schedule(oracle.step)
        gamma = rho if self.outer_schedule is None else self.outer_schedule(oracle.step)
        x, outer = moved(self.outer_step, gamma, found.estimate.grad, state.x, state.outer)
        y, of_y = moved(self.inner_step, rho, kept.d_y, state.y, state.of_y)
        return Penalized(oracle.project(x), y, kept.omega, outer, of_y, kept.of_omega)

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[Penalized] | None:
        if not are_alike(self, inner_step, outer_step):
            return None
        return replace(self, inner_step=inner_step, outer_step=outer_step)

    def stationarity(self, oracle: Oracle, state: Penalized, found: Evaluated) -> Tensor:
        kept: _Found = found.kept
        outer = oracle.residual(state.x, found.estimate.grad)
        return arrival(outer, kept.weight * kept.d_y, kept.weight * kept.d_omega)

    def point(self, state: Penalized) -> tuple[Tensor, Tensor]:
        return state.x, state.y if state.omega is None else state.omega
