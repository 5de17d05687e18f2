"""MEHA: the Moreau envelope of g in the place of its value function; g may be non-convex, and have a prox term."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._calculus import grad, total
from bilevel._estimate import FlatEstimate
from bilevel._flat import FlatProblem
from bilevel._numerics.misfits import called
from bilevel._optimizer import AbstractOptimizer, OptimizerState
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.engine.direction import residual_report
from bilevel.algorithms.engine.slopes import (
    Weight,
    arrival,
    demand_in_g,
    demand_own_steps,
    demand_weight,
    outer_slope,
    slope,
    weight_at,
)
from bilevel.algorithms.engine.steps import RowStep, Schedule, Step, are_alike, begun, moved
from bilevel.algorithms.growth import Growth
from bilevel.algorithms.oracle import Draws, Oracle
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, demand_ranges
from bilevel.inner_problems.composite import Composite
from bilevel.inner_problems.kinds import inner_objective, inner_problem
from bilevel.requirements.properties import DoesNotApply, Property


@final
@dataclass(frozen=True, eq=False)
class Envelope:
    """Everything that the rest of a run depends on.

    Attributes:
        x: `(p,)`.
        y: `(*tasks, q)`.
        theta: of the proximal problem, like y.
        outer: of the optimizer of x; None: x is stepped by a number.
        of_y: the same of y.
        of_theta: the same of theta.
    """

    x: Tensor
    y: Tensor
    theta: Tensor
    outer: OptimizerState | None = None
    of_y: OptimizerState | None = None
    of_theta: OptimizerState | None = None


@final
@dataclass(frozen=True)
class MEHA(AbstractAlgorithm[Envelope]):
    """MEHA: descent on f / c + g + r - v, v(x, y) = min_theta g(x, theta) + r(x, theta) + |theta - y|^2 / 2 s.

    r is the `prox` term of the problem, where it has one, s the `smoothing`, c_k the weight, which grows. One step
    each, in turns, those of y and theta followed by the proximal map of r:

        y     <- y - rho d_y,             d_y = grad_y f(x, y) / c + grad_y g(x, y) - (y - theta) / s
        theta <- theta - eta d_theta,     d_theta = grad_y g(x, theta) + (theta - y) / s
        x     <- P(x - gamma h),          h = grad_x f(x, y) + c grad_x [(g + r)(x, y) - (g + r)(x, theta)]

    The gradient of v is (grad_x (g + r)(x, theta*), (y - theta*) / s), where s times the most negative curvature of g
    is below 1: g need not be convex in y. y and theta are stepped on one batch, x on another.

    h is of the size of grad Phi, and gamma is that of other methods: the paper's step of x is gamma c_k.
    `Estimate.grad` is h, `Estimate.y` y, `Estimate.value` f(x, y). `tol` is compared with |(h, c d_y, c d_theta)|,
    where d_y and d_theta are those after the proximal map, (y - y_new) / rho.

    Cost: 6 calls for each sample of a batch, first derivatives only. Memory: one more y.

    Converges: with c_k growing as k^p, p < 1/2, |theta - theta*| = O(K^-1/2) at best over K steps, and the residual of
    the penalized problem O(K^-(1/2 - p)).

    Source: Liu, Liu, Zeng, Zhang, Gao, "Moreau envelope for nonconvex bi-level optimization: a single-loop and
    Hessian-free solution strategy", ICML 2024; a cycle begins with theta there.

    Args:
        inner_step: rho, of y, or an optimizer; a number where there is a prox term. Below 2 / (L + 1 / s), L the
            largest eigenvalue of d2g/dy2, and less where y and theta chase each other.
        outer_step: gamma, of x, or an optimizer.
        proximal_step: eta, of theta; None: that of y.
        weight: c, or step -> c_k.
        smoothing: s.
        schedule: step -> the factor of all steps; None: constant.
        outer_schedule: the same of gamma alone, where it is another one.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step, the weight or the smoothing is not positive; from `minimize`, if y is constrained or no
            minimizer of g and a prox term; where there is one also if y or theta is stepped by an optimizer, or the
            term is a set that moves with x.

    Example:
        >>> from bilevel import BilevelProblem, minimize, prox
        >>> lasso = BilevelProblem(
        ...     lambda x, y: (y - 1).square() / 2,
        ...     lambda x, y: (y - 3).square() / 2,
        ...     prox=lambda x: prox.L1(x),
        ... )
        >>> x0, y0 = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
        >>> algorithm = MEHA(0.3, 0.1, weight=Growth(4.0, exponent=0.25))
        >>> round(
        ...     float(minimize(lasso, x0, y0, algorithm=algorithm, max_steps=300).x), 2
        ... )  # y*(x) = 3 - x
        2.0
    """

    inner_step: RowStep
    outer_step: RowStep
    proximal_step: Step | None = None
    weight: Weight = Growth(10.0, exponent=0.25)
    smoothing: float = 1.0
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_own_steps(self, inner_step=self.inner_step, outer_step=self.outer_step, proximal_step=self.proximal_step)
        demand_weight(self, self.weight)
        demand_ranges(self, smoothing=POSITIVE)

    @property
    def requires(self) -> frozenset[Property]:
        return frozenset({Property.stationary, Property.beyond_start, Property.outer_gradient})

    @property
    def draws(self) -> Draws:
        return Draws(f=2, g=2)

    @property
    def _steps(self) -> tuple[RowStep, RowStep]:
        """Of y and of theta."""
        return self.inner_step, self.inner_step if self.proximal_step is None else self.proximal_step

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> Envelope:
        kind = inner_problem(oracle.like.problem)
        composite = isinstance(kind, Composite)
        if not composite and not {Property.minimum, Property.smooth} <= kind.offers:
            raise DoesNotApply(kind.refusal)
        if composite and any(isinstance(step, AbstractOptimizer) for step in self._steps):
            raise DoesNotApply(
                "the problem has a `prox` term, whose map needs the length of a step. Pass numbers as `inner_step=` and"
                " `proximal_step=`."
            )
        x = oracle.project(x)
        y = oracle.problem().start(x, y).detach()
        if composite:
            _demand_no_moving_set(oracle.problem(), x, y)
        else:  # a prox term may depend on x in the place of g
            demand_in_g(oracle, x, y)
        of_y, of_theta = (begun(step, y) for step in self._steps)
        return Envelope(x, y, y, begun(self.outer_step, x), of_y, of_theta)

    def evaluate(self, oracle: Oracle, state: Envelope) -> Evaluated:
        x, y, theta, c, s = state.x, state.y, state.theta, weight_at(self.weight, oracle.step), self.smoothing
        rho = 1.0 if self.schedule is None else self.schedule(oracle.step)
        inner, of_f, of_g = oracle.problem(f=1, g=1), oracle.block("f", 1).scale, oracle.block("g", 1).scale
        d_y = slope(inner, x, y, of_g, of_f / c) - (y - theta) / s
        y, d_y, of_y = self._moved(inner, x, self._steps[0], rho, d_y, y, state.of_y)
        d_theta = slope(inner, x, theta, of_g) + (theta - y) / s
        theta, d_theta, of_theta = self._moved(inner, x, self._steps[1], rho, d_theta, theta, state.of_theta)
        problem, of_f, of_g = oracle.problem(), oracle.block("f").scale, oracle.block("g").scale
        value, h = outer_slope(problem, x, y, of_f, c * of_g)
        h = h + outer_slope(problem, x, theta, 0.0, -c * of_g)[1]
        if _composite(problem) is not None:
            h = h + c * _term_slope(problem, x, y, theta)
        reports = residual_report("inner iterate", d_y), residual_report("proximal iterate", d_theta)
        kept = (Envelope(x, y, theta, state.outer, of_y, of_theta), c * d_y, c * d_theta)
        return Evaluated(FlatEstimate(h, value, y, reports), kept)

    def _moved(
        self,
        problem: FlatProblem,
        x: Tensor,
        step: RowStep,
        factor: float,
        d: Tensor,
        point: Tensor,
        state: OptimizerState | None,
    ) -> tuple[Tensor, Tensor, OptimizerState | None]:
        """A point after a step and the proximal map, what it has moved along, and the optimizer's state."""
        there, state = moved(step, factor, d, point, state)
        if isinstance(step, AbstractOptimizer) or _composite(problem) is None:
            return there, d, state
        length, prox = factor * step, inner_objective(problem, x).prox
        assert prox is not None
        if isinstance(length, Tensor):
            length = length.reshape(-1, *(1 for _ in point.shape[1:]))
        with torch.no_grad():
            there = prox(there, length)
        return there, (point - there) / length, state

    def step(self, oracle: Oracle, state: Envelope, found: Evaluated) -> Envelope:
        kept: Envelope = found.kept[0]
        rho = 1.0 if self.schedule is None else self.schedule(oracle.step)
        gamma = rho if self.outer_schedule is None else self.outer_schedule(oracle.step)
        x, outer = moved(self.outer_step, gamma, found.estimate.grad, state.x, state.outer)
        return Envelope(oracle.project(x), kept.y, kept.theta, outer, kept.of_y, kept.of_theta)

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[Envelope] | None:
        if isinstance(self.proximal_step, AbstractOptimizer) or not are_alike(self, inner_step, outer_step):
            return None
        return replace(self, inner_step=inner_step, outer_step=outer_step)

    def stationarity(self, oracle: Oracle, state: Envelope, found: Evaluated) -> Tensor:
        _, d_y, d_theta = found.kept
        return arrival(oracle.residual(state.x, found.estimate.grad), d_y, d_theta)

    def point(self, state: Envelope) -> tuple[Tensor, Tensor]:
        return state.x, state.y


def _composite(problem: FlatProblem) -> Composite | None:
    """The kind of inner problem, if it has a prox term."""
    kind = inner_problem(problem.problem)
    return kind if isinstance(kind, Composite) else None


def _term(problem: FlatProblem, x: Tensor, y: Tensor) -> Tensor:
    """r(x, y) of each task `(*tasks,)`."""
    kind, structure = _composite(problem), problem.y
    assert kind is not None
    term = kind.prox
    return problem.map(
        lambda x, y, *data: called("prox(x, data)", term, x, *data).value(structure.unravel(y)), "g", x, y
    )


def _term_slope(problem: FlatProblem, x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    """The gradient in x of r(x, y) - r(x, theta), means over tasks: `(*several, p)`."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return grad(total(_term(problem, x, y) - _term(problem, x, theta)) / (problem.tasks or 1), x)


def _demand_no_moving_set(problem: FlatProblem, x: Tensor, y: Tensor) -> None:
    """Refuse a term whose map depends on x where its value does not: a set that moves.

    Raises:
        DoesNotApply: if it is one.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        prox = inner_objective(problem, x).prox
        assert prox is not None
        if prox(y, 1.0).requires_grad and not _term(problem, x, y).requires_grad:
            raise DoesNotApply(
                "the `prox` term is a set that moves with x, and its envelope has no gradient in x. Use `ITD` with"
                " `ProximalGradient`, or an implicit estimator, in `minimize(estimator=...)`."
            )
