"""Whole bilevel algorithms as values with `init`, `evaluate` and `step`, run by `minimize`."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from bilevel._apply import apply_estimator
from bilevel._estimate import AbstractEstimator, FlatEstimate, FlatStart
from bilevel._flat import FlatProblem
from bilevel._numerics.rows import row_norms
from bilevel._optimizer import AbstractOptimizer, OptimizerState


@final
@dataclass(frozen=True, eq=False)
class OuterState:
    """Everything that the rest of a run depends on: from equal states, equal bits follow.

    Attributes:
        step: how many outer steps were taken.
        x: the outer iterate `(p,)`.
        start: the warm start for the estimate at x.
        memory: the outer optimizer's state.
    """

    step: int
    x: Tensor
    start: FlatStart
    memory: OptimizerState


class AbstractAlgorithm(abc.ABC):
    """A bilevel algorithm: at each step an estimate at the current x, then a move.

    Algorithms that interleave the levels keep their inner and linear iterates in `OuterState.start`.
    """

    @abc.abstractmethod
    def init(self, x: Tensor, start: FlatStart) -> OuterState:
        """The state before the first step."""

    @abc.abstractmethod
    def evaluate(self, problem: FlatProblem, state: OuterState) -> FlatEstimate:
        """The hypergradient estimate at `state.x`, on this step's data."""

    @abc.abstractmethod
    def step(self, state: OuterState, found: FlatEstimate) -> OuterState:
        """The state after a step along the estimate."""

    @abc.abstractmethod
    def stationarity(self, state: OuterState, found: FlatEstimate) -> Tensor:
        """What `tol` is compared with: `()`."""


@final
@dataclass(frozen=True, eq=False)
class Descent(AbstractAlgorithm):
    """x <- P(step(x, h)): any estimator, any optimizer, and a projection where x is constrained.

    Args:
        estimator: estimates h.
        outer: the outer optimizer.
        project: the projection onto the constraint, or None.
        warm_start: start each estimate from the inner and linear solutions of the one before.
        chunk_size: in task mode, how many tasks to treat at a time.
    """

    estimator: AbstractEstimator
    outer: AbstractOptimizer
    project: Callable[[Tensor], Tensor] | None = None
    warm_start: bool = True
    chunk_size: int | None = None

    def init(self, x: Tensor, start: FlatStart) -> OuterState:
        x = x if self.project is None else self.project(x)
        return OuterState(0, x, start, self.outer.init(x))

    def evaluate(self, problem: FlatProblem, state: OuterState) -> FlatEstimate:
        return apply_estimator(self.estimator, problem, state.x, state.start, self.chunk_size)

    def step(self, state: OuterState, found: FlatEstimate) -> OuterState:
        x, memory = self.outer.step(found.grad, state.x, state.memory)
        x = x if self.project is None else self.project(x)
        start = replace(state.start, count=state.start.count + 1)
        if self.warm_start:
            start = FlatStart(found.y, found.v, start.count)
        return OuterState(state.step + 1, x.detach(), start, memory)

    def stationarity(self, state: OuterState, found: FlatEstimate) -> Tensor:
        # A projection moves no further than its argument: the certified error adds to either measure.
        error = 0.0 if found.bound is None else found.bound
        if self.project is None:
            return row_norms(found.grad) + error
        return row_norms(state.x - self.project(state.x - found.grad)) + error
