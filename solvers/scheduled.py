"""A learning-rate schedule around an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel._optimizer import AbstractOptimizer, OptimizerState, Setting, learned, number, with_values
from bilevel.arguments.fits import demand_types
from bilevel.arguments.ranges import AT_LEAST_0, AT_LEAST_1, SHARE, demand_ranges


@final
@dataclass(frozen=True)
class Scheduled(AbstractOptimizer):
    """y_{k+1} = y_k + c(k) d_k, where d_k is the move of the wrapped optimizer: its step length becomes c(k) times it.

    For optimizers whose move is a multiple of their step length, which all of this library are: `Adam`,
    `GradientDescent`, `HeavyBall`, `Nesterov`. Their own state (momentum, running means) does not see the factor.

    A learned schedule is `factors`, a function of x (inside `Iterate` only) whose entry k is c(k): a vector with one
    for each step; steps beyond its end take the last. (A step that is a function of (x, k) needs none of this.)

    Cost: nothing beside the wrapped optimizer's. The number of steps so far is part of the state, so that a run that is
    resumed from a checkpoint goes on where its schedule was.

    Args:
        optimizer: whose moves are scaled.
        schedule: k -> c(k), the factor of step k = 0, 1, ...: `Cosine`, `StepDecay`, or any function.
        factors: in its place: x -> (c(0), c(1), ...), at least 0 each.

    Raises:
        TypeError: if the schedule cannot be called, or the optimizer is none.
        ValueError: if there are both or neither of `schedule` and `factors`.

    Example:
        >>> from bilevel.solvers import GradientDescent
        >>> halving = Scheduled(GradientDescent(1.0), lambda k: 0.5**k)
        >>> y, state = torch.zeros(1), halving.init(torch.zeros(1))
        >>> for _ in range(3):
        ...     y, state = halving.step(torch.ones(1), y, state)
        >>> y  # -(1 + 1/2 + 1/4)
        tensor([-1.7500])
    """

    optimizer: AbstractOptimizer
    schedule: Callable[[int], float] | None = None
    factors: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        demand_types(self)
        if (self.schedule is None) == (self.factors is None):
            raise ValueError(
                "`Scheduled` takes one of `schedule=`, a function of the number of the step, and `factors=`, a function"
                f" of x. Got {'neither' if self.schedule is None else 'both'}."
            )

    def init(self, point: Tensor) -> OptimizerState:
        wrapped = {f"scheduled.{key}": entry for key, entry in self.optimizer.init(point).items()}
        return {"steps": torch.zeros((), dtype=torch.float64, device=point.device), **wrapped}

    def step(self, grad: Tensor, point: Tensor, state: OptimizerState) -> tuple[Tensor, OptimizerState]:
        wrapped = {key.removeprefix("scheduled."): entry for key, entry in state.items() if key != "steps"}
        moved, wrapped = self.optimizer.step(grad, point, wrapped)
        factor = self._factor(int(state["steps"]))
        point = moved if isinstance(factor, float) and factor == 1 else point + factor * (moved - point)
        return point, {"steps": state["steps"] + 1, **{f"scheduled.{key}": entry for key, entry in wrapped.items()}}

    def _factor(self, k: int) -> float | Tensor:
        if self.schedule is not None:
            return float(self.schedule(k))
        factors: Tensor = number("Scheduled", "factors", self.factors)
        return factors[..., min(k, factors.shape[-1] - 1)].unsqueeze(-1)

    @property
    def entry_by_entry(self) -> bool:
        return self.optimizer.entry_by_entry

    @property
    def needs_curvature(self) -> bool:
        return self.optimizer.needs_curvature

    def tuned(self, largest_curvature: Tensor) -> Scheduled:
        return replace(self, optimizer=self.optimizer.tuned(largest_curvature))

    def with_step(self, step: float) -> Scheduled | None:
        moved = self.optimizer.with_step(step)
        return None if moved is None else replace(self, optimizer=moved)

    @property
    def settings(self) -> tuple[Setting, ...]:
        return self._own + self.optimizer.settings

    @property
    def _own(self) -> tuple[Setting, ...]:
        factors = self.factors
        return () if factors is None else (Setting("Scheduled", "factors", factors, AT_LEAST_0, by_step=True),)

    def at(self, value: Callable[[Setting], Tensor]) -> Scheduled:
        return with_values(replace(self, optimizer=self.optimizer.at(value)), self._own, value)

    @property
    def why_iteration(self) -> str:
        return learned(self.settings) or self.optimizer.why_iteration


@final
@dataclass(frozen=True)
class Cosine:
    """c(k) = floor + (1 - floor) (1 + cos(pi k / steps)) / 2 for k <= steps, then `floor`; a linear warm-up before.

    Source: Loshchilov, Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017 (without restarts).

    Args:
        steps: how many steps the fall from 1 to `floor` takes, the warm-up not counted.
        floor: the factor at the end.
        warmup: how many steps the factor rises for before, from 1 / (warmup + 1) to 1.

    Raises:
        ValueError: if `steps` is less than 1, `warmup` is negative or `floor` is not in [0, 1].

    Example:
        >>> cosine = Cosine(steps=4, warmup=1)
        >>> [round(cosine(k), 3) for k in range(7)]
        [0.5, 1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """

    steps: int
    floor: float = 0.0
    warmup: int = 0

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, steps=AT_LEAST_1, floor=SHARE, warmup=AT_LEAST_0)

    def __call__(self, step: int) -> float:
        """The factor of a step."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = min((step - self.warmup) / self.steps, 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


@final
@dataclass(frozen=True)
class StepDecay:
    """c(k) = factor^(number of milestones <= k): the step length falls at given steps.

    Args:
        milestones: the steps at which the factor is applied; one integer: at each of its multiples.
        factor: by how much.

    Raises:
        ValueError: if a milestone is less than 1 or the factor is negative.

    Example:
        >>> halving, twice = StepDecay(2, factor=0.5), StepDecay((1, 3), factor=0.1)
        >>> [halving(k) for k in range(5)], [round(twice(k), 2) for k in range(5)]
        ([1.0, 1.0, 0.5, 0.5, 0.25], [1.0, 0.1, 0.1, 0.01, 0.01])
    """

    milestones: int | tuple[int, ...]
    factor: float = 0.5

    def __post_init__(self) -> None:
        demand_types(self)
        demand_ranges(self, milestones=AT_LEAST_1, factor=AT_LEAST_0)

    def __call__(self, step: int) -> float:
        """The factor of a step."""
        if isinstance(self.milestones, int):
            return float(self.factor ** (step // self.milestones))
        return float(self.factor ** sum(milestone <= step for milestone in self.milestones))
