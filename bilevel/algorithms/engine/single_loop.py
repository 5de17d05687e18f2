"""The engine of single loops: a direction, a variance reduction, steps and their schedules."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import final

from torch import Tensor

from bilevel._estimate import FlatEstimate
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.engine.direction import AbstractDirection, Coupled, Joint
from bilevel.algorithms.engine.reduction import AbstractReduction, Plain, Reduced, demand_direction
from bilevel.algorithms.engine.steps import (
    LoopState as LoopState,
    RowStep,
    Schedule as Schedule,
    Step as Step,
    along,
    are_alike,
    begun,
    demand_steps as demand_steps,
    entry_by_entry,
    lengths,
    moved,
    reports,
    required,
    size,
    within,
)
from bilevel.algorithms.oracle import Draws, Oracle
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, demand_ranges
from bilevel.bounds.beforehand import Beforehand
from bilevel.bounds.bound import Bound
from bilevel.ranks.ranks import Ranks
from bilevel.requirements.properties import Property


@final
@dataclass(frozen=True)
class SingleLoop(AbstractAlgorithm[LoopState]):
    """y <- y - rho_t d_y, v <- v - rho'_t d_v, x <- P(x - gamma_t d_x), all at once, d a direction made less noisy.

    Four values that do not know of each other: the direction d = (d_x, d_y, d_v) from batches, the variance reduction,
    the products with second derivatives (in the direction), and the schedule of the steps. The algorithms of the
    literature are such combinations, and so is one of your own. `tol` is compared with |(d_x, d_y, d_v)|, the
    projection's residual for d_x where x is constrained.

    Args:
        inner_step: rho, of y, or an optimizer in its place.
        outer_step: gamma, of x, or an optimizer in its place, such as `Adam(1e-3)` or `TorchOptim(...)`.
        linear_step: rho', of v; None: that of y, which must then be a number.
        direction: what is moved along.
        reduction: of its variance.
        schedule: step -> the factor of rho and rho'; None: constant.
        outer_schedule: the same of gamma; None: that of rho.
        linear_radius: v is projected on |v| <= this; None: it is not.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a step is not positive, or rho' is left open where y is stepped by an optimizer.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem, FiniteSum, minimize
        >>> from bilevel.algorithms import Saga
        >>> a = torch.tensor([2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
        >>> problem = BilevelProblem(
        ...     lambda x, y, a: (y - a).square().mean() / 2,
        ...     lambda x, y, a: (y - a * x).square().mean() / 2,
        ... )
        >>> loop = SingleLoop(inner_step=0.3, outer_step=0.02, reduction=Saga())
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> solution = minimize(
        ...     problem, x0, x0, algorithm=loop, data=FiniteSum(a, batch_size=1), max_steps=1500
        ... )
        >>> round(float(solution.x), 6)  # y*(x) = 3.5 x
        1.0
    """

    inner_step: RowStep
    outer_step: RowStep
    linear_step: float | None = None
    direction: AbstractDirection = field(default_factory=Coupled)
    reduction: AbstractReduction = field(default_factory=Plain)
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None
    linear_radius: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, linear_radius=POSITIVE)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step, self.direction.is_linear)

    @property
    def requires(self) -> frozenset[Property]:
        return required(self.direction)

    @property
    def draws(self) -> Draws:
        return self.direction.draws

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> LoopState:
        x = oracle.project(x)
        y = oracle.problem().start(x, y).detach()
        at = Joint(x, y, self.direction.linear_start(y))
        memory = self.reduction.init(oracle, self.direction, at)
        return LoopState(*at, memory, begun(self.outer_step, x), begun(self.inner_step, y))

    def evaluate(self, oracle: Oracle, state: LoopState) -> Evaluated:
        at = Joint(state.x, state.y, state.v)
        found = self.reduction.reduce(oracle, self.direction, at, state.memory)
        return Evaluated(FlatEstimate(found.joint.x, found.value, state.y, reports(found.joint), state.v), found)

    def step(self, oracle: Oracle, state: LoopState, found: Evaluated) -> LoopState:
        reduced: Reduced = found.kept
        d = reduced.joint
        rho = 1.0 if self.schedule is None else self.schedule(oracle.step)
        gamma = rho if self.outer_schedule is None else self.outer_schedule(oracle.step)
        x, outer = moved(self.outer_step, gamma, d.x, state.x, state.outer)
        y, inner = moved(self.inner_step, rho, d.y, state.y, state.inner)
        v = state.v
        if v is not None and d.v is not None:
            length = lengths(self.inner_step, self.linear_step)
            v = within(self.linear_radius, along(v, d.v, rho, length))
        return LoopState(oracle.project(x), y, v, reduced.memory, outer, inner)

    def beside(self, inner_step: RowStep, outer_step: RowStep) -> AbstractAlgorithm[LoopState] | None:
        if not (self.direction.goes_beside and are_alike(self, inner_step, outer_step)):
            return None
        return replace(self, inner_step=inner_step, outer_step=outer_step)

    def of_seeds(self, seeds: tuple[int, ...]) -> AbstractAlgorithm[LoopState] | None:
        direction = self.direction.of_seeds(seeds)
        reduction = self.reduction.of_seeds(seeds)
        if direction is None or reduction is None:
            return None
        return replace(self, direction=direction, reduction=reduction)

    def stationarity(self, oracle: Oracle, state: LoopState, found: Evaluated) -> Tensor:
        reduced: Reduced = found.kept
        return size(oracle, state.x, reduced.joint)

    def error_bound(self, about: Beforehand) -> Bound:
        demand_direction(self.reduction)
        return self.direction.error_bound(about)

    @property
    def takes_shards(self) -> bool:
        plain = isinstance(self.reduction, Plain) and isinstance(self.direction, Coupled) and self.linear_radius is None
        first = Property.second_derivatives not in self.requires
        return plain and first and entry_by_entry(self.inner_step)

    def is_apart(self, state: LoopState) -> bool:
        return self.reduction.is_apart(state.memory)

    def gathered(self, state: LoopState, ranks: Ranks) -> LoopState:
        return replace(state, memory=self.reduction.gathered(state.memory, ranks))

    def of_rank(self, state: LoopState, ranks: Ranks) -> LoopState:
        return replace(state, memory=self.reduction.of_rank(state.memory, ranks))

    def point(self, state: LoopState) -> tuple[Tensor, Tensor]:
        return state.x, state.y
