"""The engine of nested loops: x first, then steps of y at the new x, by differences on the same batches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import final

from torch import Tensor

from bilevel._estimate import FlatEstimate
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.engine.direction import AbstractDirection, Coupled, Joint
from bilevel.algorithms.engine.steps import (
    LoopState,
    RowStep,
    Schedule,
    along,
    are_alike,
    begun,
    demand_steps,
    lengths,
    moved,
    reports,
    required,
    size,
)
from bilevel.algorithms.oracle import Draws, Oracle
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_1, demand_ranges
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
from bilevel.requirements.properties import Property


@final
@dataclass(frozen=True, eq=False)
class Carried:
    """The direction at the current point, and f on its batch; None before the first."""

    d_x: Tensor | None = None
    d_y: Tensor | None = None
    d_v: Tensor | None = None
    value: Tensor | None = None


@final
@dataclass(frozen=True)
class Nested(AbstractAlgorithm[LoopState]):
    """x first, x' = P(x - gamma d_x), then y at the new x': the direction follows by differences (SPIDER).

        every `period` steps  d = D on all the data;     x' = P(x - gamma_t d_x);     (x, y)_old = (x, y)
        for t = 0, ..., T     d <- d + D(x', y; B_t) - D((x, y)_old; B_t);  (x, y)_old = (x', y);
                              y <- y - rho_t d_y, but not after the last

    with the same batches B_t at both points, new ones for each t; the first of the old points is the one that x has
    left. v is moved as y is, where the direction has one. After the last difference d is that of the new (x', y).

    `tol` is compared with |(d_x, d_y, d_v)|.

    Cost: 2 (T + 1) directions on batches, and one on all the data every `period` steps. Memory: a direction, and on the
    way three points and two directions.

    Args:
        inner_step: rho, of y, or an optimizer in its place.
        outer_step: gamma, of x, or an optimizer in its place.
        linear_step: rho', of v; None: that of y, which must then be a number.
        inner_steps: T.
        direction: D.
        period: how many steps from one full evaluation to the next; None: as many as see all samples once.
        schedule: step -> the factor of rho and rho'; None: constant.
        outer_schedule: the same of gamma; None: that of rho.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive, a number of steps below 1, or rho' is left open where y is stepped by an
            optimizer; from `minimize`, if the data are batches only.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, minimize
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 3).square() / 2, lambda x, y: (y - x).square() / 2
        ... )
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> loop = Nested(inner_step=0.5, outer_step=0.2, inner_steps=3)
        >>> round(float(minimize(problem, x0, x0, algorithm=loop, max_steps=100).x), 6)
        3.0
    """

    inner_step: RowStep
    outer_step: RowStep
    linear_step: float | None = None
    inner_steps: int = 1
    direction: AbstractDirection = field(default_factory=Coupled)
    period: int | None = None
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, inner_steps=AT_LEAST_1, period=AT_LEAST_1)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step, self.direction.is_linear)

    @property
    def requires(self) -> frozenset[Property]:
        return required(self.direction)

    @property
    def draws(self) -> Draws:
        each, times = self.direction.draws, self.inner_steps + 1
        return Draws(f=times * each.f, g=times * each.g)

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> LoopState:
        x = oracle.project(x)
        y = oracle.problem().start(x, y).detach()
        v = self.direction.linear_start(y)
        return LoopState(x, y, v, Carried(), begun(self.outer_step, x), begun(self.inner_step, y))

    def evaluate(self, oracle: Oracle, state: LoopState) -> Evaluated:
        carried: Carried = state.memory
        if carried.d_x is None or oracle.step % (self.period or oracle.epoch) == 0:
            d, value = self.direction.on_everything(oracle, Joint(state.x, state.y, state.v))
        else:
            assert carried.d_y is not None and carried.value is not None
            d, value = Joint(carried.d_x, carried.d_y, carried.d_v), carried.value
        return Evaluated(FlatEstimate(d.x, value, state.y, reports(d), state.v), d)

    def step(self, oracle: Oracle, state: LoopState, found: Evaluated) -> LoopState:
        d: Joint = found.kept
        old, value, inner = Joint(state.x, state.y, state.v), found.estimate.value, state.inner
        rho = 1.0 if self.schedule is None else self.schedule(oracle.step)
        gamma = rho if self.outer_schedule is None else self.outer_schedule(oracle.step)
        x, outer = moved(self.outer_step, gamma, d.x, state.x, state.outer)
        at, each = old._replace(x=oracle.project(x)), self.direction.draws
        for t in range(self.inner_steps + 1):
            new, value = self.direction.on_batches(oracle, at, t * each.f, t * each.g)
            was, _ = self.direction.on_batches(oracle, old, t * each.f, t * each.g)
            d, old = d.plus(new.plus(was, -1.0)), at
            if t < self.inner_steps:
                y, inner = moved(self.inner_step, rho, d.y, at.y, inner)
                v = at.v
                if v is not None and d.v is not None:
                    v = along(v, d.v, rho, lengths(self.inner_step, self.linear_step))
                at = Joint(at.x, y, v)
        return LoopState(*at, Carried(*d, value), outer, inner)

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[LoopState] | None:
        if not (self.direction.goes_beside and are_alike(self, inner_step, outer_step)):
            return None
        return replace(self, inner_step=inner_step, outer_step=outer_step)

    def of_seeds(self, seeds: tuple[int, ...]) -> AbstractAlgorithm[LoopState] | None:
        direction = self.direction.of_seeds(seeds)
        return None if direction is None else replace(self, direction=direction)

    def stationarity(self, oracle: Oracle, state: LoopState, found: Evaluated) -> Tensor:
        d: Joint = found.kept
        return size(oracle, state.x, d)

    def error_bound(self, about: Beforehand) -> Bound:
        return self.direction.error_bound(about)

    def point(self, state: LoopState) -> tuple[Tensor, Tensor]:
        return state.x, state.y
