"""F2SA: the value function's derivative by differences in the weight of f, first order only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel._estimate import FlatEstimate
from bilevel._flat import FlatProblem
from bilevel._optimizer import AbstractOptimizer, OptimizerState
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.engine.curvature import least_curvature, most_data
from bilevel.algorithms.engine.direction import residual_report
from bilevel.algorithms.engine.slopes import (
    REQUIRES,
    Weight,
    arrival,
    demand_in_g,
    demand_own_steps,
    demand_weight,
    outer_slope,
    slope,
    weight_at,
)
from bilevel.algorithms.engine.steps import RowStep, Schedule, are_alike, begun, entry_by_entry, moved
from bilevel.algorithms.oracle import Draws, Oracle
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, demand_ranges
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound, known
from bilevel.bounds.iterations import gradient_descent
from bilevel.bounds.weighted import f2sa
from bilevel.requirements.properties import DoesNotApply, Property


@final
@dataclass(frozen=True, eq=False)
class Copies:
    """Everything that the rest of a run depends on.

    Attributes:
        x: `(p,)`.
        low: y_j of the lower j, 0 (order 1) or -1 (order 2): `(*tasks, q)`.
        high: y_1.
        order: 1 or 2.
        curvature: the least of g - f / weight in y at the start, where the order was left open; None: it was not.
        outer: of the optimizer of x; None: x is stepped by a number.
        of_low: the same of `low`.
        of_high: the same of `high`.
    """

    x: Tensor
    low: Tensor
    high: Tensor
    order: int
    curvature: float | None = None
    outer: OptimizerState | None = None
    of_low: OptimizerState | None = None
    of_high: OptimizerState | None = None

    @property
    def y(self) -> Tensor:
        """The best guess of y*(x)."""
        return self.low if self.order == 1 else torch.lerp(self.low, self.high, 0.5)


@final
@dataclass(frozen=True)
class F2SA(AbstractAlgorithm[Copies]):
    """F2SA: x <- P(x - gamma h), h the derivative of min_y g + nu f in x, and in nu by a difference; nu = 1 / weight.

    With l_nu(x) = min_y g + nu f, d/dnu d/dx l_nu at nu = 0 is grad Phi. Two copies of y, warm-started, follow the
    minimizers for two values of nu, and h is the difference quotient. `inner_steps` times, then once,

        order 1:  y_j <- y_j - rho (j nu grad_y f + grad_y g),  j = 0, 1
                  h = grad_x f(x, y_1) + [grad_x g(x, y_1) - grad_x g(x, y_0)] / nu
        order 2:  the same for j = -1, 1
                  h = [grad_x f(x, y_1) + grad_x f(x, y_-1)] / 2 + [grad_x g(x, y_1) - grad_x g(x, y_-1)] / 2 nu

    each step on a batch of its own, the same one for both copies: samples that differ would leave noise of weight times
    that of grad_x g, instead of that of a difference. What is stepped is g + nu f, so that rho fits g, whatever the
    weight (never f + weight g).

    Order 2 is as cheap in memory, more accurate, and the default. It needs g - nu f to be strongly convex in y, which
    is *measured* where the run starts, on all the data where they are known, else on the first batches: the least
    eigenvalue of H_g - nu H_f, by 64 Lanczos steps that `stats` does not count. (weight mu above the curvature of f is
    sufficient, and not necessary.) Where it is not positive the default is order 1, and `Estimate.note` says so;
    order=2 is refused. Once positive it may turn negative elsewhere: then y_-1 diverges. (With parameters that are
    shared out over ranks nothing is measured, and the order must be given.)

    `Estimate.y` is y_0 (order 1), or the mean (y_-1 + y_1) / 2 = y* + O(nu^2), of which neither alone is better than
    O(nu). `Estimate.value` is f at y_1, or the mean of its two values.

    Where f and g are quadratic, h is off by (d2f/dxdy + J' d2f/dy2) (y - y*) with J = dy*/dx and y = y_1 (order 1),
    y = (y_-1 + y_1) / 2 (order 2): y - y* is -nu (H + nu C)^-1 b and nu^2 (H + nu C)^-1 C (H - nu C)^-1 b, with
    C = d2f/dy2, b = grad_y f(x, y*). So doubling the weight divides the bias by 2 and by 4; `error_bound` bounds it.

    `tol` is compared with |(h, weight d_0, weight d_1)|, d_j what the copies move along; it is zero at a stationary
    point of the penalized problem, which is off by the bias.

    Cost: with K inner steps 3 (K + 1) calls (order 1) or 4 (K + 1) (order 2) for each sample of a batch; first
    derivatives only. Memory: one more y, and no graph but that of one gradient.

    Converges: for g strongly convex and smooth in y, and a noise of bounded variance, |grad Phi| <= e after
    O(e^-6) (order 1), O(e^-5) (order 2) calls up to logarithms, with weights of the order of 1/e, e^-1/2. Batches leave
    noise of the order of the weight: let it grow slowly (`Growth`).

    Source: Kwon, Kwon, Wright, Nowak, "A fully first-order method for stochastic bilevel optimization", ICML 2023; as
    differences in nu, and order 2: "On the complexity of finite-difference fully first-order methods" (F2SA-p), ICLR
    2026, algorithm 1, there with x moved by h / |h|.

    Args:
        inner_step: rho, of both copies, or an optimizer; at most 2 / L with L the largest eigenvalue of H_g + nu H_f.
        outer_step: gamma, of x, or an optimizer.
        weight: 1 / nu, or step -> weight.
        inner_steps: K.
        order: 1 or 2; None: 2 where it applies.
        schedule: step -> the factor of rho and gamma; None: constant.
        outer_schedule: the same of gamma alone, where it is another one.
        shared: whether one batch of f and one of g serve all of a step; the inner steps and h are then not independent.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step or the weight is not positive, `inner_steps` below 1 or the order neither 1 nor 2; from
            `minimize`, if order=2 does not apply, or y is constrained or no minimizer of g.

    Example:
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> solution = minimize(
        ...     problem, x0, x0, algorithm=F2SA(0.5, 0.2, weight=10.0), max_steps=200
        ... )
        >>> (
        ...     round(float(solution.x), 4),
        ...     round(float(solution.y), 4),
        ... )  # here y_-1 + y_1 - 6 is zero where h is
        (3.0, 3.0)
    """

    inner_step: RowStep
    outer_step: RowStep
    weight: Weight = 10.0
    inner_steps: int = 1
    order: int | None = None
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        demand_types(self)
        demand_own_steps(self, inner_step=self.inner_step, outer_step=self.outer_step)
        demand_weight(self, self.weight)
        demand_ranges(self, inner_steps=AT_LEAST_1)
        if self.order not in (None, 1, 2):
            raise ValueError(f"`F2SA(order=...)` must be 1 or 2, or None for 2 where it applies. Got {self.order}.")

    @property
    def requires(self) -> frozenset[Property]:
        return REQUIRES

    @property
    def draws(self) -> Draws:
        batches = 1 if self.shared else self.inner_steps + 1
        return Draws(f=batches, g=batches)

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> Copies:
        x = oracle.project(x)
        y = oracle.problem().start(x, y).detach()
        demand_in_g(oracle, x, y)
        order, least = self._order(oracle, x, y)
        state = begun(self.inner_step, y)
        return Copies(x, y, y, order, least, begun(self.outer_step, x), state, state)

    def _order(self, oracle: Oracle, x: Tensor, y: Tensor) -> tuple[int, float | None]:
        """The order, and the curvature that decided it where it was left open.

        Raises:
            DoesNotApply: if order 2 is asked for, and does not apply.
        """
        if self.order == 1:
            return 1, None
        if oracle.like.sharded:  # products with Hessians are not there
            if self.order == 2:
                return 2, None
            raise DoesNotApply(
                "with parameters that are shared out over ranks it cannot be measured whether g - f / weight is convex"
                " in y. Pass `order=1`, or `order=2` where it is known to be."
            )
        weight = weight_at(self.weight, 0)
        least, rounding = least_curvature(most_data(oracle), x, y, -1 / weight)
        convex = not least <= rounding  # where it is not a number something else will say so
        if self.order is None:
            return (2 if convex else 1), least
        if not convex:
            raise DoesNotApply(
                f"`order=2` needs g - f / weight to be strongly convex in y, and its least curvature at the start is"
                f" {least:.3g} with weight {weight:g}. Raise the weight, or take `order=1`."
            )
        return 2, None

    def evaluate(self, oracle: Oracle, state: Copies) -> Evaluated:
        weight, x = weight_at(self.weight, oracle.step), state.x
        rho = 1.0 if self.schedule is None else self.schedule(oracle.step)
        low, high, of_low, of_high = state.low, state.high, state.of_low, state.of_high
        j = 0.0 if state.order == 1 else -1.0
        d_low = d_high = torch.zeros_like(low)
        for number in range(self.inner_steps):
            problem, of_f, of_g = self._batch(oracle, number + 1)
            d_low = slope(problem, x, low, of_g, j * of_f / weight if j else 0.0)
            d_high = slope(problem, x, high, of_g, of_f / weight)
            low, of_low = moved(self.inner_step, rho, d_low, low, of_low)
            high, of_high = moved(self.inner_step, rho, d_high, high, of_high)
        problem, of_f, of_g = self._batch(oracle, 0)  # both copies on the same samples
        share = 1.0 if state.order == 1 else 0.5
        f_high, h_high = outer_slope(problem, x, high, share * of_f, share * weight * of_g)
        rest = (1 - share) * of_f if share < 1 else 0.0
        f_low, h_low = outer_slope(problem, x, low, rest, -share * weight * of_g)
        value = f_high if state.order == 1 else torch.lerp(f_low, f_high, 0.5)
        kept = Copies(x, low, high, state.order, state.curvature, state.outer, of_low, of_high)
        reports = (residual_report("inner iterate", d_low), residual_report("penalized inner iterate", d_high))
        note, least = "", state.curvature
        if least is not None and state.order == 1:
            note = f"order 1: g - f / weight is not strongly convex in y (least curvature {least:.3g} at the start)"
        moves = (kept, weight * d_low, weight * d_high)
        return Evaluated(FlatEstimate(h_high + h_low, value, kept.y, reports, note=note), moves)

    def _batch(self, oracle: Oracle, number: int) -> tuple[FlatProblem, float | Tensor, float | Tensor]:
        """A batch of both, and what makes means over it unbiased."""
        number = 0 if self.shared else number
        problem = oracle.problem(f=number, g=number)
        return problem, oracle.block("f", number).scale, oracle.block("g", number).scale

    def step(self, oracle: Oracle, state: Copies, found: Evaluated) -> Copies:
        kept: Copies = found.kept[0]
        rho = 1.0 if self.schedule is None else self.schedule(oracle.step)
        gamma = rho if self.outer_schedule is None else self.outer_schedule(oracle.step)
        x, outer = moved(self.outer_step, gamma, found.estimate.grad, state.x, state.outer)
        return Copies(
            oracle.project(x), kept.low, kept.high, state.order, state.curvature, outer, kept.of_low, kept.of_high
        )

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[Copies] | None:
        if not are_alike(self, inner_step, outer_step):
            return None
        return replace(self, inner_step=inner_step, outer_step=outer_step)

    @property
    def takes_shards(self) -> bool:
        return entry_by_entry(self.inner_step)

    def stationarity(self, oracle: Oracle, state: Copies, found: Evaluated) -> Tensor:
        _, d_low, d_high = found.kept
        return arrival(oracle.residual(state.x, found.estimate.grad), d_low, d_high, problem=oracle.like)

    def point(self, state: Copies) -> tuple[Tensor, Tensor]:
        return state.x, state.y

    def error_bound(self, about: Beforehand) -> Bound:
        call = "error_bound(F2SA(...))"
        if self.order is None:
            raise ValueError(f"`{call}` needs the order, which is derived at run time. Pass `order=`.")
        if isinstance(self.inner_step, AbstractOptimizer):
            raise ValueError(f"no bound is known for `{call}` with an optimizer as `inner_step`. Give a number.")
        if isinstance(self.inner_step, Tensor):
            raise ValueError(f"no bound is known for `{call}` with several runs side by side.")
        weight, b, given = weight_at(self.weight, 0), about.outer_gradient_norm, about.constants
        step = self.inner_step * (1.0 if self.schedule is None else self.schedule(0))
        mu, L, L_fyy, negative = known(call, given, "mu", "L", "L_fyy", "L_f_minus")

        def after(least: float) -> float:
            """How far a copy is from its minimizer, where f / weight takes at most so much from the curvature of g."""
            room = mu - least / weight
            if not room > 0:
                raise ValueError(f"`{call}` needs a weight above {least / mu:.3g} for a bound. Got {weight:g}.")
            shift = b / (weight * room)
            penalized = replace(given, mu=room, L=L + L_fyy / weight, radius=max(0.0, given.radius - shift))
            return gradient_descent(penalized, step=step, steps=self.inner_steps, distance=about.distance + shift)

        high, low = after(negative), 0.0
        if self.order == 1:
            low = gradient_descent(given, step=step, steps=self.inner_steps, distance=about.distance)
        return f2sa(
            given,
            weight=weight,
            outer_gradient_norm=b,
            order=self.order,
            quadratic=about.quadratic,
            distance=low,
            penalized_distance=high if self.order == 1 else max(high, after(L_fyy)),
        )
