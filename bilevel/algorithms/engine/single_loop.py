"""The engine of single loops: a direction, a variance reduction, steps and their schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from bilevel._calculus import Exact
from bilevel._estimate import FlatEstimate
from bilevel._numerics.rows import safe_row_norms
from bilevel._optimizer import AbstractOptimizer, OptimizerState
from bilevel.algorithms.algorithm import AbstractAlgorithm, Evaluated
from bilevel.algorithms.engine.direction import AbstractDirection, Coupled, Joint, residual_report
from bilevel.algorithms.engine.reduction import AbstractReduction, Plain, Reduced
from bilevel.algorithms.oracle import Draws, Oracle
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import POSITIVE, demand_ranges
from bilevel.requirements.properties import Property

Schedule: TypeAlias = Callable[[int], float]  # step -> factor
Step: TypeAlias = float | AbstractOptimizer


@final
@dataclass(frozen=True, eq=False)
class LoopState:
    """Everything that the rest of a loop depends on.

    Attributes:
        x: `(p,)`.
        y: `(*tasks, q)`.
        v: like y; None: the loop has no linear iterate.
        memory: of the variance reduction.
        outer: of the optimizer of x; None: x is stepped by a number.
        inner: the same of y.
    """

    x: Tensor
    y: Tensor
    v: Tensor | None
    memory: Any = None
    outer: OptimizerState | None = None
    inner: OptimizerState | None = None


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
        >>> from bilevel import BilevelProblem, FiniteSum, minimize
        >>> from bilevel.algorithms import Saga
        >>> a = torch.tensor([2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
        >>> problem = BilevelProblem(
        ...     lambda x, y, a: (y - a).square().mean() / 2, lambda x, y, a: (y - a * x).square().mean() / 2
        ... )
        >>> loop = SingleLoop(inner_step=0.3, outer_step=0.02, reduction=Saga())
        >>> x0 = torch.tensor(0.0, dtype=torch.float64)
        >>> solution = minimize(problem, x0, x0, algorithm=loop, data=FiniteSum(a, batch_size=1), max_steps=1500)
        >>> round(float(solution.x), 6)  # y*(x) = 3.5 x
        1.0
    """

    inner_step: Step
    outer_step: Step
    linear_step: float | None = None
    direction: AbstractDirection = field(default_factory=Coupled)
    reduction: AbstractReduction = field(default_factory=Plain)
    schedule: Schedule | None = None
    outer_schedule: Schedule | None = None
    linear_radius: float | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, linear_radius=POSITIVE)
        demand_steps(self, self.inner_step, self.outer_step, self.linear_step)

    @property
    def requires(self) -> frozenset[Property]:
        second = frozenset({Property.second_derivatives})
        exact = not isinstance(self.direction, Coupled) or isinstance(self.direction.products, Exact)
        return frozenset({Property.stationary, Property.smooth, Property.beyond_start}) | (second if exact else set())

    @property
    def draws(self) -> Draws:
        return self.direction.draws

    def init(self, oracle: Oracle, x: Tensor, y: Tensor) -> LoopState:
        x = oracle.project(x)
        y = oracle.problem().start(x, y).detach()
        at = Joint(x, y, self.direction.linear_start(y))
        memory = self.reduction.init(oracle, self.direction, at)
        return LoopState(*at, memory, _begun(self.outer_step, x), _begun(self.inner_step, y))

    def evaluate(self, oracle: Oracle, state: LoopState) -> Evaluated:
        at = Joint(state.x, state.y, state.v)
        found = self.reduction.reduce(oracle, self.direction, at, state.memory)
        reports = [residual_report("inner iterate", found.joint.y)]
        if found.joint.v is not None:
            reports.append(residual_report("linear iterate", found.joint.v))
        return Evaluated(FlatEstimate(found.joint.x, found.value, state.y, tuple(reports), state.v), found)

    def step(self, oracle: Oracle, state: LoopState, found: Evaluated) -> LoopState:
        reduced: Reduced = found.kept
        d = reduced.joint
        rho = 1.0 if self.schedule is None else self.schedule(oracle.step)
        gamma = rho if self.outer_schedule is None else self.outer_schedule(oracle.step)
        x, outer = _moved(self.outer_step, gamma, d.x, state.x, state.outer)
        y, inner = _moved(self.inner_step, rho, d.y, state.y, state.inner)
        v = state.v
        if v is not None and d.v is not None:
            length = self.inner_step if self.linear_step is None else self.linear_step
            assert not isinstance(length, AbstractOptimizer)
            v = v - rho * length * d.v
            if self.linear_radius is not None:
                v = v * (self.linear_radius / safe_row_norms(v).unsqueeze(-1)).clamp(max=1.0)
        return LoopState(oracle.project(x), y, v, reduced.memory, outer, inner)

    def stationarity(self, oracle: Oracle, state: LoopState, found: Evaluated) -> Tensor:
        reduced: Reduced = found.kept
        d = reduced.joint
        outer = oracle.residual(state.x, d.x).reshape(1)
        norm: Tensor = torch.linalg.vector_norm(
            torch.cat([outer, d.y.reshape(-1), *(() if d.v is None else (d.v.reshape(-1),))])
        )
        return norm

    def point(self, state: LoopState) -> tuple[Tensor, Tensor]:
        return state.x, state.y


def demand_steps(loop: Any, inner_step: Step, outer_step: Step, linear_step: float | None) -> None:
    """Refuse steps that are none.

    Raises:
        ValueError: naming the one.
    """
    call = type(loop).__name__
    for name, step in (("inner_step", inner_step), ("outer_step", outer_step), ("linear_step", linear_step)):
        if not isinstance(step, AbstractOptimizer):
            demand_ranges(loop, None, **{name: POSITIVE})
        elif step.needs_curvature:
            raise ValueError(f"`{call}({name}={type(step).__name__}())` needs a step size: pass `step=...`.")
    if linear_step is None and isinstance(inner_step, AbstractOptimizer):
        raise ValueError(f"`{call}(inner_step=<an optimizer>)` needs `linear_step=`, a number, for v.")


def _begun(step: Step, point: Tensor) -> OptimizerState | None:
    return step.init(point) if isinstance(step, AbstractOptimizer) else None


def _moved(
    step: Step, factor: float, d: Tensor, point: Tensor, state: OptimizerState | None
) -> tuple[Tensor, OptimizerState | None]:
    """The point after a step, and the optimizer's state; a schedule scales what an optimizer makes of the direction."""
    if not isinstance(step, AbstractOptimizer):
        return torch.add(point, d, alpha=-factor * step), None
    assert state is not None
    there, after = step.step(d, point, state)
    there = there.detach()
    return there if factor == 1.0 else torch.lerp(point, there, factor), after
